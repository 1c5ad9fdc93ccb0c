"""Ray Data's loggers, which it has no option for. Names only: imports nothing of Ray. Read in Ray 2.60.0."""

LOGGER = "ray.data"
"""Prints four lines per execution."""
PROGRESS_LOGGER = "ray.data._internal.progress"
"""Warns that progress bars are off."""
