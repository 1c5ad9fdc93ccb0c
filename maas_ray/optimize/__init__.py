"""Exports checkpoints to bundles."""
