"""Names of Ray Data's loggers, for which it has no option. Imports nothing of Ray. Read in Ray 2.60.0."""

LOGGER = "ray.data"
"""It logs four lines per execution."""
PROGRESS_LOGGER = "ray.data._internal.progress"
"""It warns that progress bars are off."""
