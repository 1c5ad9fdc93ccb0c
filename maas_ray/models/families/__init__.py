"""The built-in model families, one per file."""
