"""how tensors travel between actors, and how waits are driven"""
