"""A replica inside Ray Serve: starts the servers, and reaches the other replicas and pools."""
