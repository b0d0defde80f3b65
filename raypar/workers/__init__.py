"""What runs in the processes that Ray starts.

Enter by: train_worker, stage_actor, ray_errors, ray_private.
"""
