"""The limit of open files of a process. Imports nothing else of this package and opens no file."""

import resource

UNLIMITED = 1 << 20
"""Value used for an infinite or larger limit: no part of this system needs more."""


def raise_limit() -> int:
    """Raises the soft limit of open files to the hard limit; returns the new soft limit.

    Child processes inherit the limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):  # macOS refuses values above its own limit
            pass
    return _number(soft)


def limit() -> int:
    """The hard limit, up to which a process can raise its soft limit."""
    return _number(resource.getrlimit(resource.RLIMIT_NOFILE)[1])


def _number(found: int) -> int:
    return UNLIMITED if found == resource.RLIM_INFINITY or found > UNLIMITED else found
