"""Bundles: a graph with its signature, labels, parity report and lineage, committed together for serving."""
