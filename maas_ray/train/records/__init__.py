"""The records of a run in the store: manifest and log, index of runs, report, TensorBoard files."""
