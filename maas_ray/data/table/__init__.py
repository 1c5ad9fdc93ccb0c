"""Prepares tables: column kinds, cleaning, statistics, target, split and report."""
