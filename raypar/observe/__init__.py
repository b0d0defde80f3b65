"""what a run shows: timeline, bubble, progress, and metrics to come; no torch, no ray"""
