"""What is served: a graph with its signature, labels, proofs and lineage, committed as one thing."""
