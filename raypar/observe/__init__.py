"""What a run shows: timeline, bubble, progress. Imports neither torch nor ray.

Enter by: timeline, bubble, progress.
"""
