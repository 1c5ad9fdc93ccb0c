"""The psutil that Ray ships, which every machine with Ray has. Read in Ray 2.60.0."""

import ray  # noqa: F401  (adds the shipped psutil to the import path)
from ray._common.utils import psutil

__all__ = ["psutil"]
