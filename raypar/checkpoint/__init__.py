"""State becomes files and comes back.

Enter by: manifest, saver, shards, contents, weights.
"""
