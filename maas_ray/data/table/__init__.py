"""Preparing a table: kinds, cleaning, statistics, target, split and report."""
