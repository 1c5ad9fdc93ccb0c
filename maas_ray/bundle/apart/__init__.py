"""Versions that run in a process of their own: what crashes, hangs or takes too much memory there leaves the replica be."""
