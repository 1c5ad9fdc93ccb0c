"""The data specification, and the fitted description of the columns."""
