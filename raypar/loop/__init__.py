"""what a train loop calls: parallelize, epochs, batches, train_step, report; and local mode, which runs it in one process"""
