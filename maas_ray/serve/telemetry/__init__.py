"""Telemetry of inference requests: counters, Prometheus text, access log and traces."""
