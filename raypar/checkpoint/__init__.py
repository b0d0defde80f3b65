"""state becomes files and comes back: manifest, shards, contents, weights"""
