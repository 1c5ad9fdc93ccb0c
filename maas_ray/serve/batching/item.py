"""Item: one request in the queue and in the batcher."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from maas_ray.bundle.datatypes import Array
from maas_ray.display import get_logger
from maas_ray.errors import MaasError

log = get_logger(__name__)

Tensors = Mapping[str, Array]
NOTHING: Tensors = {}
"""Inputs of an item that was answered or cancelled."""
Done = Callable[[Tensors | None, MaasError | None], None]
"""Callback with the outputs or the error, called once, on the loop."""


class Item:
    """One request. `done` is None once it has been answered or cancelled.

    Args:
        inputs: validated tensors, each with `num_rows` rows.
        num_rows: number of rows as parsed.
        num_bytes: memory used by the request.
        deadline: time on the loop's clock after which the response is not wanted.
        done: receives the result.
        priority: 1 is the highest; 0 is lower than all others.
    """

    __slots__ = (
        "arrived_s", "deadline", "done", "has_ended_process", "inputs", "is_waiting", "lane", "num_bytes", "num_rows", "priority", "queue_s",
        "queued_at", "rank", "run_s",
    )  # fmt: skip

    rank: tuple[float, float, int]
    """Rank among the items of its tenant; the queue sets this and the next two for its own use."""
    lane: Any
    """Lane in which it waits."""
    queued_at: float
    """Time on the loop's clock when it was queued; set only if runs are delayed."""
    arrived_s: float
    """Time on the finest clock when it was parsed and ready to be queued."""

    def __init__(
        self, inputs: Tensors, num_rows: int, num_bytes: int, deadline: float, done: Done, priority: int = 0
    ) -> None:
        self.inputs = inputs
        self.num_rows = num_rows
        self.num_bytes = num_bytes
        self.deadline = deadline
        self.done: Done | None = done
        self.priority = priority
        self.is_waiting = False
        self.has_ended_process = False
        """Whether a process died while it ran this request, alone or with others."""
        self.arrived_s = perf_counter()
        self.queue_s = self.run_s = 0.0
        """Seconds until its first run, and seconds of the run that answered it; 0 before that, and if no statistics
        are collected."""

    def deliver(self, outputs: Tensors | None, error: MaasError | None, sender: str) -> None:
        """Calls `done` and releases the inputs; has no effect once the item was answered or cancelled.

        Args:
            outputs: its own rows of the outputs.
            error: reason why there are no outputs.
            sender: name of the model version, for the log.
        """
        done, self.done = self.done, None
        if done is None:
            return
        self.inputs = NOTHING  # the queue may keep the item itself a little longer
        try:
            done(outputs, error)
        except Exception:  # a failed callback must not lose the responses of other callers
            log.exception("the response of %s could not be delivered", sender)


def live(items: list[Item]) -> list[Item]:
    """Returns the items that were neither answered nor cancelled."""
    return [item for item in items if item.done is not None]
