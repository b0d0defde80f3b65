"""what is to be done: plans, schedules, programs, where to cut; no torch, no ray"""
