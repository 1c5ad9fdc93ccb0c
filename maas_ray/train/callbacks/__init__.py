"""Callbacks: the interface by which user code follows a run, and the callbacks of the package."""
