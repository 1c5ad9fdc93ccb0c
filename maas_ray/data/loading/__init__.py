"""Loads the batches of one rank from a prepared data set, in a reproducible order."""
