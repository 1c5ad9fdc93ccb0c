"""A notice board between a run's workers and its driver: an actor, and the thread that reads it to whoever asked.

The actor's process also starts the workers and watches them (train/launch.py). It imports Ray Train for that, which
takes 2 s: begin a board first and read specs and data meanwhile. Imports neither torch nor ray.train itself.
"""

import importlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from maas_ray.errors import MaasError
from maas_ray.store.objects import StorageSpec
from maas_ray.train.progress import Progress

POLL_S = 0.5
TIMEOUT_S = 60.0
"""Longest wait for an answer of the board."""
_LAUNCH = "maas_ray.train.launch"


@dataclass(frozen=True)
class Launch:
    """What starting a run's workers takes."""

    run: str
    name: str
    """Of this launch; Ray Train would silently resume its own state under a name it has seen."""
    spec: str
    """The TrainSpec as JSON, with an absolute store. Not the object: its classes import torch, which takes 2 s."""
    data_digest: str
    storage: StorageSpec
    count: int
    cpus: int
    gpus: int
    max_restarts: int
    timeout_s: float


@ray.remote(num_cpus=0, max_concurrency=16)  # `train` takes one thread until the run ends
class Board:
    """Holds the newest report of rank 0 for the driver, and an error that no further attempt can mend."""

    def __init__(self) -> None:
        self._newest: Progress | None = None
        self._failure: MaasError | None = None
        importlib.import_module(_LAUNCH)  # by name: a driver that imports this file must not wait for Ray Train

    def train(self, job: Launch) -> MaasError | None:
        """Runs all attempts of a run to its end; returns the error that ended it, if one did."""
        launch = importlib.import_module(_LAUNCH).launch
        error: MaasError | None = launch(job, ray.get_runtime_context().current_actor)
        return self._failure or error

    def stop(self) -> None:
        """Ends the workers and frees their resources, if `train` goes on."""
        importlib.import_module(_LAUNCH).stop()

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


def start_board() -> Any:
    """Begins a board on this node and returns at once."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return Board.options(scheduling_strategy=here).remote()  # type: ignore[attr-defined]


@contextmanager
def follow(board: Any, on_progress: Callable[[Progress], None] | None) -> Iterator[None]:
    """A thread of this process hands each new report on while the block runs."""
    ended = threading.Event()

    def run() -> None:
        seen: Progress | None = None
        while True:
            is_last = ended.wait(POLL_S)
            try:
                newest = ray.get(board.newest.remote(), timeout=TIMEOUT_S)
            except ray.exceptions.RayError:  # the board is dead, which the driver learns where it waits for it
                return
            if newest is not None and newest != seen and on_progress is not None:
                on_progress(newest)
                seen = newest
            if is_last:
                return

    follower = threading.Thread(target=run, name="training-progress", daemon=True)
    follower.start()
    try:
        yield
    finally:
        ended.set()
        follower.join(timeout=TIMEOUT_S)


def end_board(board: Any) -> None:
    """Ends a board, and a training that it has begun."""
    # One that is dead already holds nothing that could be freed.
    with suppress(ray.exceptions.RayError):
        ray.get(board.stop.remote(), timeout=TIMEOUT_S)
    ray.kill(board)
