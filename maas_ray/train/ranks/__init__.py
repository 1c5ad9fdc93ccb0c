"""The ranks of a run on Ray Train: start, heartbeats, failures, and the worker itself."""
