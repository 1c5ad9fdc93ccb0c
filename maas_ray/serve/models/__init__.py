"""Model versions in a replica's memory: desired state, loading, eviction, and the errors shown to clients."""
