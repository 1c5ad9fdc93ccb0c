"""The model versions in a replica's memory: which are wanted, loading, evicting, and what callers are told."""
