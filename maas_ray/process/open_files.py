"""How many files a process may have open, and how many connections that is. Imports nothing else and opens nothing."""

import resource

UNLIMITED = 1 << 20
"""Taken for a limit that is none, or larger: no part of this system needs more."""


def raise_limit() -> int:
    """Raises the soft limit of open files to the hard one; returns how many this process may have open from now on.

    What it starts later inherits the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS refuses what is above its own bound
            pass
    return _number(soft)


def limit() -> int:
    """The hard limit: what a process may have open once it asks for it."""
    return _number(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _number(found: int) -> int:
    return UNLIMITED if found == resource.RLIM_INFINITY or found > UNLIMITED else found
