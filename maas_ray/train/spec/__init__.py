"""The specification of a training run: validation only, no torch."""
