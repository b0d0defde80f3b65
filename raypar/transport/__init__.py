"""How tensors travel between actors, and how waits are driven.

Enter by: interface, channel, memory_links, process_links.
"""
