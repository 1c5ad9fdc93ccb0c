"""Finds and ends the processes of one cluster by an environment variable. Independent of Ray's kinds of processes.

A process belongs to the cluster if `MAAS_RAY_CLUSTER_ID` in its initial environment is the cluster's id. Ray detaches
its daemons, and HAProxy and workers start and end at any time, so that neither a list of pids nor a process group
contains all of them. Every child inherits the environment, and programs that only connect do not. Children of a process
of the cluster belong to it too: a program can be started with an environment of its own, and the environment of one
that is just starting or renames itself cannot always be read.
"""

import os
import time
from collections.abc import Callable

from maas_ray.ray_internals.processes import psutil

MARKER = "MAAS_RAY_CLUSTER_ID"
_LOOK_S = 0.2
_SURE_S = 0.1
"""Pause between the two looks that must both find no process: one that is replaced by another program at the moment of
a look has no environment."""


def find_processes(cluster_id: str) -> list[psutil.Process]:
    """All live processes of the cluster. A psutil handle contains pid and start time, so that a reused pid is safe."""
    known: set[int] = set()
    children: dict[int, list[psutil.Process]] = {}
    found = []
    for process in psutil.process_iter():
        if process.pid == os.getpid():
            continue
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                continue
            children.setdefault(process.ppid(), []).append(process)
            if (marker := process.environ().get(MARKER)) is not None:
                known.add(process.pid)
                if marker == cluster_id:  # others are of a cluster that a process of this one has started
                    found.append(process)
        except (psutil.Error, OSError):
            continue  # it has ended, or belongs to another user
    for process in found:  # grows: their children, and the children of these
        for child in children.get(process.pid, ()):
            if child.pid not in known:
                known.add(child.pid)
                found.append(child)
    return found


def end_processes(
    cluster_id: str,
    *,
    grace_s: float,
    last: Callable[[str], bool] = lambda name: False,
    is_hurried: Callable[[], bool] = lambda: False,
    timeout_s: float = 30.0,
) -> list[int]:
    """Ends all processes of the cluster: terminates them, waits, then kills the remaining ones until none exists.

    Args:
        cluster_id: id of the cluster.
        grace_s: time between SIGTERM and SIGKILL.
        last: whether a process of this name receives no SIGTERM, because the others need it in order to end.
        is_hurried: polled; once it returns True, the remaining processes are killed without further wait.
        timeout_s: timeout for killed processes to end.

    Returns:
        pids of the processes that remain after `timeout_s` (stuck in the kernel); normally none.
    """
    asked = [process for process in find_processes(cluster_id) if not last(process_name(process))]
    for process in asked:
        _signal(process.terminate)
    patience = time.monotonic() + grace_s
    while asked and not is_hurried() and (left_s := patience - time.monotonic()) > 0:
        _, asked = psutil.wait_procs(asked, timeout=min(left_s, _LOOK_S))
    deadline = time.monotonic() + timeout_s
    while remaining := _find_surely(cluster_id):  # repeated, to find processes that were just starting
        if time.monotonic() > deadline:
            return [process.pid for process in remaining]
        for process in remaining:
            _signal(process.kill)
        psutil.wait_procs(remaining, timeout=1)
    return []


def _find_surely(cluster_id: str) -> list[psutil.Process]:
    """As `find_processes`, but none only if a second look finds none either."""
    found = find_processes(cluster_id)
    if not found:
        time.sleep(_SURE_S)
        found = find_processes(cluster_id)
    return found


def process_name(process: psutil.Process) -> str:
    """The name of a process; empty if it has ended."""
    try:
        return str(process.name())
    except psutil.Error:
        return ""


def _signal(send: Callable[[], None]) -> None:
    try:
        send()
    except psutil.NoSuchProcess:
        return  # it ended on its own
