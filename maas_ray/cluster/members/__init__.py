"""Starts a head node, joins a cluster as a worker node, and leaves it."""
