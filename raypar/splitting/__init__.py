"""A user's model becomes the code of its stages.

Enter by: model, choose, split, stage_code, trace, wired.
"""
