"""Ongoing requests: those that have left the queue and may have no response yet."""

from collections import deque
from typing import Protocol

from maas_ray.errors import MaasError
from maas_ray.serve.batching.item import Item, Tensors, live
from maas_ray.serve.batching.protocols import CancelToken, Loop, Runner

_OVERDUE, _OVERDUE_S = 4.0, 0.25
"""A run that takes longer than this multiple of its estimate, and longer than this many seconds, is stopped as soon as
one of its requests expires: one of them is slow, and the others are run again without it."""


class RunOwner(Protocol):
    """Receiver of the results of runs; implemented by the dispatcher."""

    def ended(self, run: "BatchRun", outputs: Tensors | None, error: MaasError | None, run_s: float) -> None:
        """Answers the requests of a run, or has them run again."""
        ...


class BatchRun:
    """One run of the engine.

    Args:
        owner: receives the result.
        items: requests whose rows are merged, in this order; empty for the repeated run of the merge guard.
        num_rows: rows of the run.
        started_s: start time on the loop's clock.
    """

    __slots__ = ("_owner", "items", "num_rows", "started_s", "stop")

    def __init__(self, owner: RunOwner, items: list[Item], num_rows: int, started_s: float) -> None:
        self._owner = owner
        self.items = items
        self.num_rows = num_rows
        self.started_s = started_s
        self.stop: CancelToken | None = None
        """Stops the run; None if it cannot be stopped, or has been."""

    def finished(self, outputs: Tensors | None, error: MaasError | None, run_s: float = 0.0, /) -> None:
        """Passes the result on; see `Finished`. A method, since a `partial` costs 0.2 microseconds more."""
        self._owner.ended(self, outputs, error, run_s)


class Ongoing:
    """The current runs, and the parts of failed runs that are to be run again. `Dispatcher` and `FailedRuns` change
    both.

    Args:
        runner: estimates the time of a run.
        loop: clock.
    """

    def __init__(self, runner: Runner, loop: Loop) -> None:
        self.runs: list[BatchRun] = []
        """Current runs, the oldest first."""
        self.retries: deque[list[Item]] = deque()
        """Requests to be run again, each part in a run of its own."""
        self._runner = runner
        self._loop = loop

    @property
    def items(self) -> list[Item]:
        """All requests in a run or in a part, including answered and cancelled ones."""
        running = (item for run in self.runs for item in run.items)
        return [*running, *(item for part in self.retries for item in part)]

    @property
    def busy_s(self) -> float:
        """Seconds since the oldest current run started; 0 while the engine is idle."""
        return self._loop.time() - self.runs[0].started_s if self.runs else 0.0

    def stop_unwanted(self) -> None:
        """Stops runs whose requests have all left, and overdue runs that made a request late."""
        for run in self.runs:
            left = live(run.items)
            if run.stop is not None and len(left) < len(run.items) and (not left or self._is_overdue(run, left[0])):
                run.stop.set()
                run.stop = None

    def _is_overdue(self, run: BatchRun, item: Item) -> bool:
        form_of = self._runner.form_of
        expected_s = self._runner.estimate_s(run.num_rows, form_of(item.inputs) if form_of is not None else ())
        return self._loop.time() - run.started_s > max(_OVERDUE * expected_s, _OVERDUE_S)
