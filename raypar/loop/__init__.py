"""What a train loop calls: parallelize, epochs, batches, train_step, report; and local mode.

Enter by: parallelize, batches, replica, session, local, in_process, actors.
"""
