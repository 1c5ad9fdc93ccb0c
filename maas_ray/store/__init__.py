"""Bytes with a proof: an object store, commits whose manifest is written last, and append-only sequences."""
