"""How copies of the same weights stay equal: ddp, fsdp, scatter, local SGD, ties.

Enter by: strategies, sync, ties.
"""
