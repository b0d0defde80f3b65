"""What is to be done: plans, schedules, programs, where to split. Imports neither torch nor ray.

Enter by: place, plan, schedule, schedules, program, simulate, partition.
"""
