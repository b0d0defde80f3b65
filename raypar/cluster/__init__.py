"""The driver's side of Ray: room for a plan, starting, watching, restarting.

Enter by: launch, placement, shipping.
"""
