"""Replica inside Ray Serve: starts its servers, and calls other replicas and pools."""
