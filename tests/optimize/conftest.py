"""The cases of tests/export."""

from tests.export.conftest import cases

__all__ = ["cases"]
