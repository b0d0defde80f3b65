"""What a run shows: timeline, bubble, progress. Imports neither torch nor ray.

Enter by: actor_info, timeline, bubble, progress.
"""
