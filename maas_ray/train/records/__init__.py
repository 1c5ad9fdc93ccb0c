"""What a run leaves in the store: its record and log, the index of runs, reports and TensorBoard files."""
