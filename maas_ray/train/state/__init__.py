"""Training state by name: restoring it under any parallelism, and warm starts."""
