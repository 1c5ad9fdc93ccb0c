"""Two training programs on the same CPUs at the same time, of which one computes while the other one is stopped.

Runs one after the other are a minute apart, in which a shared host changes its speed by more than what is measured. Here
the ranks of one side are stopped (SIGSTOP) while those of the other compute, a few seconds each, and steps count that
began and ended within a turn.

The CPU time of the ranks is noted too: where a host gives a machine its CPUs by the moment, it says what a step costs when
times do not.
"""

import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

from ray._common.utils import psutil

from benchmarks.training.ours import Timed

TURN_S = 4.0
EDGE_S = 0.2
"""At the beginning of a turn: what was on its way when the other side was stopped."""
START_S = 120.0
MAX_LOST = 3
"""Turns in which a rank may end before the measurement is given up."""
_POLL_S = 0.5


def in_turns(ours: Callable[[], Timed], theirs: Callable[[], Timed], marks: tuple[str, str], ranks: int, pairs: int, log_every: int) -> tuple[list[dict[str, float]], list[Timed]]:  # fmt: skip
    """Median time of a step of each side and CPU time of one rank for it, in seconds, per pair of turns; and both runs.

    Args:
        ours: runs our side to its end.
        theirs: runs the other one.
        marks: what stands in the command lines of the ranks of each side, and of no other process.
        ranks: of each side.
        pairs: turns of each side.
        log_every: steps between two times that a side notes down; both do so from a multiple of it on.
    """
    began, turns, num_lost = time.time(), [], 0
    with ThreadPoolExecutor(2) as pool:
        sides = [pool.submit(ours), pool.submit(theirs)]
        groups = [find_ranks(mark, ranks, began, sides) for mark in marks]
        try:
            time.sleep(_starting(groups))
            while len(turns) < 2 * pairs and not any(side.done() for side in sides):
                turn = len(turns) % 2
                _send(signal.SIGSTOP, groups[1 - turn])
                _send(signal.SIGCONT, groups[turn])
                start, used = time.time(), cpu_s(groups[turn])
                time.sleep(TURN_S)
                spent = used_since(used, cpu_s(groups[turn]))
                if spent is not None:
                    turns.append((turn, start, time.time(), spent / ranks))
                    continue
                num_lost += 1
                print(f"a rank of {marks[turn]} ended in a turn, which is left out", file=sys.stderr)
                if num_lost > MAX_LOST:
                    raise RuntimeError(f"ranks ended in {num_lost} turns")
        finally:
            for group in groups:
                _send(signal.SIGCONT, group)
        runs = [side.result() for side in sides]
    times = [step_times(runs[turn].done, start + EDGE_S, end, log_every) for turn, start, end, _ in turns]
    costs = [
        cpu_s * statistics.mean(steps) / (end - start) if steps else 0.0
        for (_, start, end, cpu_s), steps in zip(turns, times, strict=True)
    ]
    found = [
        {
            "ours_s": statistics.median(times[i]),
            "plain_s": statistics.median(times[i + 1]),
            "ours_cpu_s": costs[i],
            "plain_cpu_s": costs[i + 1],
        }
        for i in range(0, len(turns) - 1, 2)
        if times[i] and times[i + 1]
    ]
    return found, runs


def find_ranks(mark: str, count: int, since: float, sides: list[Future[Timed]]) -> list[psutil.Process]:
    """The processes with `mark` in their command lines that began after `since`, when there are `count` of them.

    Raises:
        RuntimeError: there were not as many within `START_S`.
        Exception: what ended one of the sides.
    """
    deadline = time.monotonic() + START_S
    while time.monotonic() < deadline and not any(side.done() for side in sides):
        found = []
        for process in psutil.process_iter(["cmdline", "create_time"]):
            line = " ".join(process.info["cmdline"] or ())
            if mark in line and "torch.distributed.run" not in line and process.info["create_time"] >= since - 1:
                found.append(process)
        if len(found) == count:
            return found
        time.sleep(_POLL_S)
    for side in sides:
        if side.done():
            side.result()  # its error
    raise RuntimeError(f"no {count} processes of {mark} within {START_S:g} s")


def _starting(groups: list[list[psutil.Process]]) -> float:
    """Both sides import torch at the same time; turns without a step of one side are left out in any case."""
    return 10.0 * max(1, len(groups) * len(groups[0]) / (os.cpu_count() or 1))


def cpu_s(group: list[psutil.Process]) -> float | None:
    """CPU time of all threads of these processes since their beginning, without what the host took away.

    None if one of them has ended: its counter is lost, and the sum of the others is less than it was.
    """
    try:
        if any(process.status() == psutil.STATUS_ZOMBIE for process in group):
            return None
        found = [process.cpu_times() for process in group]
    except psutil.NoSuchProcess:
        return None
    return sum(one.user + one.system for one in found)


def used_since(before: float | None, now: float | None) -> float | None:
    """CPU time between two readings; None if one is missing or the counter went back."""
    return now - before if before is not None and now is not None and now >= before else None


def _send(number: int, group: list[psutil.Process]) -> None:
    for process in group:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def step_times(done: Mapping[int, float], start: float, end: float, log_every: int) -> list[float]:
    """Times of a step between two notes, `log_every` steps apart, that both lie in the turn from `start` to `end`."""
    notes = sorted(done.items())
    return [(b - a) / (n - m) for (m, a), (n, b) in pairwise(notes) if start <= a and b <= end and n - m == log_every]
