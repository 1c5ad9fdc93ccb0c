"""The specification of pools: validation only."""
