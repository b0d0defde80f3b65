"""rows become batches: which rows, and reading them"""
