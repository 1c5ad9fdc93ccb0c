"""Determines the batch dimension of a graph, and whether the graph computes each row independently of the others."""
