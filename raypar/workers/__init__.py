"""what runs in the processes that Ray starts: train worker, stage actor"""
