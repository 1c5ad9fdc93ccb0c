"""One machine: its requirements, environment, processes, and the record of what was started on it."""
