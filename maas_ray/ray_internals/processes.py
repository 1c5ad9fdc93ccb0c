"""The psutil that Ray ships, so that there is one on each machine that has Ray. Read in Ray 2.60.0."""

import ray  # noqa: F401  (puts the psutil that it ships on the import path)
from ray._common.utils import psutil

__all__ = ["psutil"]
