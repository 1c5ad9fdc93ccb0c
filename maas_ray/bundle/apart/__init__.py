"""Runs versions in a separate process, so that crashes, hangs and memory exhaustion do not affect the replica."""
