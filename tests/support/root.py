"""The folder of the project, from wherever a test is."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
