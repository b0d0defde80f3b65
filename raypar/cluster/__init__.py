"""the driver's side of Ray: room for a plan, starting, watching, restarting"""
