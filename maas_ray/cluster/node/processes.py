"""Finds and ends the processes of one cluster, by a variable that they all inherit. Knows nothing of Ray's kinds.

A process of the cluster is one in whose initial environment `MAAS_RAY_CLUSTER_ID` has the cluster's id. Ray starts
its daemons detached, HAProxy and workers come and go, so that neither a list of pids nor a process group holds them
all; an environment is inherited by every child, and never by the programs that only connect.
"""

import os
import time
from collections.abc import Callable

from maas_ray.ray_internals.processes import psutil

MARKER = "MAAS_RAY_CLUSTER_ID"
_LOOK_S = 0.2


def find_processes(cluster_id: str) -> list[psutil.Process]:
    """All living processes of the cluster; psutil's handles are bound to pid and start time, so a reused pid is safe."""
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.environ().get(MARKER) == cluster_id and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or belongs to another user
    return found


def end_processes(
    cluster_id: str,
    *,
    grace_s: float,
    last: Callable[[str], bool] = lambda name: False,
    is_hurried: Callable[[], bool] = lambda: False,
    timeout_s: float = 30.0,
) -> list[int]:
    """Ends all processes of the cluster: asks, waits, then kills whatever is left, until none is.

    Args:
        cluster_id: whose processes.
        grace_s: time between asking (SIGTERM) and killing (SIGKILL).
        last: by process name, those that are not asked, because the others need them to end in order.
        is_hurried: asked again and again; once it is true, what is left is killed without waiting any longer.
        timeout_s: time for killed processes to be gone.

    Returns:
        pids that are still there after `timeout_s` (stuck in the kernel); normally none.
    """
    asked = [process for process in find_processes(cluster_id) if not last(_name(process))]
    for process in asked:
        _signal(process.terminate)
    patience = time.monotonic() + grace_s
    while asked and not is_hurried() and (left_s := patience - time.monotonic()) > 0:
        _, asked = psutil.wait_procs(asked, timeout=min(left_s, _LOOK_S))
    deadline = time.monotonic() + timeout_s
    while remaining := find_processes(cluster_id):  # again and again: one that was starting is not missed
        if time.monotonic() > deadline:
            return [process.pid for process in remaining]
        for process in remaining:
            _signal(process.kill)
        psutil.wait_procs(remaining, timeout=1)
    return []


def _name(process: psutil.Process) -> str:
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return  # it ended on its own
