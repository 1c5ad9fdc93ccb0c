"""Counters, Prometheus text, access log and traces of inference requests."""
