"""Callbacks: what a run tells a user's code, and the ones that come with the package."""
