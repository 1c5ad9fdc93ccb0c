"""The specification of a data set, and what preparation learned about its columns."""
