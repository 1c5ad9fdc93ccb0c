"""The ranks of a run on Ray Train: starting them, heartbeats, failures, and the worker itself."""
