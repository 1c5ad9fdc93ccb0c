"""Metrics and predictions of a model on held-out rows, on any layout."""
