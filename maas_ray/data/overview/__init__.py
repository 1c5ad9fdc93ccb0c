"""The overview of a data set before any training: kinds, distributions, identifiers, leakage. Imported by nothing below."""
