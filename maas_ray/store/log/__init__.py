"""The records of append-only sequences: format, snapshots, reading, checks and retention."""
