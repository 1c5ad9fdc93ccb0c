"""The format of prepared data sets in the store."""
