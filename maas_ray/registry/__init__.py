"""Which version of a model is which bundle, and which version an alias names: a fold over an append-only log."""
