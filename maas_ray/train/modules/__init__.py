"""What is done to a model's modules: dropout, compilation, activation checkpointing, deferred initialization."""
