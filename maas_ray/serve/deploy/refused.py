"""Reports why the HAProxy of a node does not start, as recorded by the launcher there; Serve does not report it."""

import time
from collections.abc import Callable

import ray

from maas_ray.cluster.node.open_files import refusals
from maas_ray.errors import ClusterError

LOOK_S = 3.0
"""Seconds between two checks."""


def refuse_without_front() -> None:
    """Raises `ClusterError` with the reasons of all nodes whose HAProxy cannot be started; lost nodes have none."""
    try:
        found = refusals()
    except ray.exceptions.RayError:
        return
    if found:
        raise ClusterError(f"the HTTP front does not start; {'; '.join(found)}")


def with_reasons(is_done: Callable[[], str]) -> Callable[[], str]:
    """Wraps a condition to wait for, so that the wait ends with the reason if a front cannot start."""
    look_at = time.monotonic() + LOOK_S

    def look() -> str:
        nonlocal look_at
        missing = is_done()
        if missing and time.monotonic() > look_at:
            refuse_without_front()
            look_at = time.monotonic() + LOOK_S
        return missing

    return look
