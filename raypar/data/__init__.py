"""Rows become batches: which rows, and reading them.

Enter by: sources.
"""
