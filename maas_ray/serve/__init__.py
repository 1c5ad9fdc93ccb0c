"""Serving bundles over HTTP: wire formats, batching, ingress, replicas and pools."""
