"""This process: its signals, open files, module search path and garbage collection."""
