"""Why the HAProxy of a node does not start, where the launcher there has said so. Serve itself says nothing of it."""

import time
from collections.abc import Callable

import ray

from maas_ray.cluster.node.open_files import refusals
from maas_ray.errors import ClusterError

LOOK_S = 3.0
"""Between two looks."""


def refuse_without_front() -> None:
    """Raises `ClusterError` with the reason of each node whose HAProxy cannot be started; a lost node has none."""
    try:
        found = refusals()
    except ray.exceptions.RayError:
        return
    if found:
        raise ClusterError(f"the HTTP front does not start; {'; '.join(found)}")


def with_reasons(is_done: Callable[[], str]) -> Callable[[], str]:
    """A condition to wait for, whose wait ends with the reason if a front was refused: it would last to its end."""
    look_at = time.monotonic() + LOOK_S

    def look() -> str:
        nonlocal look_at
        missing = is_done()
        if missing and time.monotonic() > look_at:
            refuse_without_front()
            look_at = time.monotonic() + LOOK_S
        return missing

    return look
