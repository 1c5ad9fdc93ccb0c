"""Data sets: reading sources, splitting, cleaning, storing and loading them in a reproducible order."""
