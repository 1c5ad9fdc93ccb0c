"""Measures training: step time, start, recipes, checkpoints."""
