"""Hyperparameter search: a space over fields of a TrainSpec, whose trials are ordinary runs."""
