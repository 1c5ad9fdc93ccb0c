"""The records of append-only sequences: their form, their snapshots, how they are read, checked and kept short."""
