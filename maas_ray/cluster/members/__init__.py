"""Machines of a cluster: starting a head, joining it, leaving it."""
