"""Restores training state by name under any parallelism, and loads initial weights."""
