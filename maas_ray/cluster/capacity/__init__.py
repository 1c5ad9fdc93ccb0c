"""The capacity of a cluster: nodes, autoscaler limits, preflight and claims."""
