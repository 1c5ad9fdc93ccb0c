"""Hyper-parameter search: a space over the fields of a TrainSpec, and trials that are runs like any other."""
