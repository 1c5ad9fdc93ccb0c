"""One request as the queue and the batcher know it. Decides nothing."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

from maas_ray.bundle.datatypes import Array
from maas_ray.errors import MaasError

Tensors = Mapping[str, Array]
Done = Callable[[Tensors | None, MaasError | None], None]
"""Called once with the outputs or with the error, on the loop."""


class Item:
    """One request. `done` is None once it has been answered or cancelled.

    Args:
        inputs: checked tensors, each with `num_rows` rows.
        num_rows: rows as parsed.
        num_bytes: what the request holds in memory.
        deadline: time of the loop's clock after which nobody waits for the answer.
        done: gets the answer.
        priority: 1 is the highest; 0 comes after all others.
    """

    __slots__ = (
        "arrived_s", "deadline", "done", "has_ended_process", "inputs", "is_waiting", "lane", "num_bytes", "num_rows", "priority", "queue_s",
        "queued_at", "rank", "run_s",
    )  # fmt: skip

    rank: tuple[float, float, int]
    """Place among those of its tenant; this and the next two are set by the queue, for itself."""
    lane: Any
    """Where it waits."""
    queued_at: float
    """Time of the loop's clock when it was queued; kept only where runs are delayed."""
    arrived_s: float
    """When it was read and ready to be queued, by the finest clock."""

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
        """A process died while it ran this request, alone or with others."""
        self.arrived_s = perf_counter()
        self.queue_s = self.run_s = 0.0
        """How long it waited for its first run, and how long the run lasted that answered it; 0 until then, and where
        no statistics are kept."""
