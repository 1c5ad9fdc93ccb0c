"""Between callers and replicas: Serve's proxy, HAProxy's limits, sleeping pools, and who may reach a replica."""
