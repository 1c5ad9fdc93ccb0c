"""A notice board between a run's workers and its driver: an actor, and the thread that reads it to whoever asked."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray

from maas_ray.errors import MaasError
from maas_ray.train.progress import Progress

POLL_S = 0.5
TIMEOUT_S = 60.0
"""Longest wait for an answer of the board."""


@ray.remote(num_cpus=0)
class Board:
    """Holds the newest report of rank 0 for the driver, and an error that no further attempt can mend."""

    def __init__(self) -> None:
        self._newest: Progress | None = None
        self._failure: MaasError | None = None

    def put(self, progress: Progress) -> None:
        """Replaces the newest report."""
        self._newest = progress

    def newest(self) -> Progress | None:
        """The newest report, if there is one yet."""
        return self._newest

    def fail(self, error: MaasError) -> None:
        """Keeps the first such error; the ones that follow are its consequences."""
        self._failure = self._failure or error

    def failure(self) -> MaasError | None:
        """The error that ended the run for good, if there is one."""
        return self._failure


@contextmanager
def open_board(on_progress: Callable[[Progress], None] | None) -> Iterator[Any]:
    """A board, and a thread of this process that hands each new report on; both end with the block."""
    board = Board.remote()  # type: ignore[attr-defined]
    ended = threading.Event()

    def follow() -> None:
        seen: Progress | None = None
        while True:
            is_last = ended.wait(POLL_S)
            newest = ray.get(board.newest.remote(), timeout=TIMEOUT_S)
            if newest is not None and newest != seen and on_progress is not None:
                on_progress(newest)
                seen = newest
            if is_last:
                return

    follower = threading.Thread(target=follow, name="training-progress", daemon=True)
    follower.start()
    try:
        yield board
    finally:
        ended.set()
        follower.join(timeout=TIMEOUT_S)
        ray.kill(board)
