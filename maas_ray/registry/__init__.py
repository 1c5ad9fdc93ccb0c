"""The model registry: versions with their bundles, and aliases, as a fold over an append-only log."""
