"""The stored format of prepared data sets."""
