"""What a cluster has room for: nodes, autoscaler limits, preflight and claims."""
