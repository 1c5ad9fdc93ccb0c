"""The version of this package, for what the package itself writes and compares."""

__version__ = "0.1.0"
