"""CPU time of code and of processes. Wall time says nothing on a machine that others use."""

import os
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def of_call(work: Callable[[], object], repeats: int = 5) -> float:
    """Median seconds of CPU that a call takes in this thread."""
    spent = []
    for _ in range(repeats):
        began = time.thread_time()
        work()
        spent.append(time.thread_time() - began)
    return statistics.median(spent)


def of_process(pid: int, with_children: bool = False) -> float:
    """Seconds of CPU that a process has had so far; 10 ms is the kernel's resolution."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15] if with_children else fields[11:13])) / _TICKS_PER_S


def of_children(work: Callable[[], object], repeats: int = 3) -> float:
    """Median seconds of CPU of the child processes that a call starts and waits for."""
    spent = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        work()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(spent)
