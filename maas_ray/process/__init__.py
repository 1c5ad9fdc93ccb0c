"""Settings of this process: signals, open files, module search path, garbage collection."""
