"""Which dimension of a graph counts the rows of its callers, and whether the graph keeps those rows apart."""
