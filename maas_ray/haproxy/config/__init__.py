"""HAProxy configuration, edited as text."""
