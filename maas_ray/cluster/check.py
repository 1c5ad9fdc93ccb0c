"""The result of one health check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """The result of one health check."""

    name: str
    ok: bool
    detail: str
    fix: str = ""
    """What to do; empty if `ok`."""
