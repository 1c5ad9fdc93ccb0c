"""Exports checkpoints to bundles, and verifies the exports."""
