"""Optimizers and their learning-rate schedules: built-in ones, and a user's with its check and its state."""
