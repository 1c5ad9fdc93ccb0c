"""Layer between clients and replicas: Serve's proxy, HAProxy's limits, pools scaled to zero, and access to replicas."""
