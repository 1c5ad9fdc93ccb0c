"""Changes of a model's modules: dropout, compilation, activation checkpointing, deferred initialization."""
