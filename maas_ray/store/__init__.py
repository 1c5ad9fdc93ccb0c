"""Verified storage: an object store, commits whose manifest is written last, and append-only sequences."""
