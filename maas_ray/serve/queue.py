"""The bounded queue of one model version: which requests wait, and which of them may share a run. Runs nothing.

Rows are merged only for equal sizes beyond the batch dimension; groups of different sizes take turns, and inside a
group first come, first served.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping

from pydantic import PositiveInt

from maas_ray.bundle.datatypes import Array
from maas_ray.errors import MaasError, Overloaded
from maas_ray.spec import Spec

Tensors = Mapping[str, Array]
Done = Callable[[Tensors | None, MaasError | None], None]
"""Called once with the outputs or with the error, on the loop."""


class BatchSpec(Spec):
    """How rows are merged, and how many may wait."""

    max_batch_size: PositiveInt = 64
    """Most rows of one run. A single request with more rows runs alone."""
    max_queued_requests: PositiveInt = 512
    """Requests of one model version that may wait; one more is answered 503 at once."""
    max_queued_bytes: PositiveInt = 256 << 20
    """Bytes of requests that may wait in one replica, over all its models."""


class ByteBudget:
    """Bytes of waiting requests, shared by all queues of a replica.

    Args:
        limit: most bytes that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0


class Item:
    """One request. `done` is None once it has been answered or cancelled.

    Args:
        inputs: checked tensors, each with `num_rows` rows.
        num_rows: rows as parsed.
        num_bytes: what the request holds in memory.
        deadline: time of the loop's clock after which nobody waits for the answer.
        done: gets the answer.
    """

    __slots__ = ("deadline", "done", "inputs", "key", "num_bytes", "num_rows")

    def __init__(self, inputs: Tensors, num_rows: int, num_bytes: int, deadline: float, done: Done) -> None:
        self.inputs = inputs
        self.num_rows = num_rows
        self.num_bytes = num_bytes
        self.deadline = deadline
        self.done: Done | None = done
        self.key: tuple[object, ...] = ()


class Queue:
    """Waiting items in groups that may share a run.

    Args:
        spec: sizes and bounds.
        budget: bytes shared with the other queues of the replica.
        name: of the model version, for messages.
    """

    def __init__(self, spec: BatchSpec, budget: ByteBudget, name: str) -> None:
        self._spec = spec
        self._budget = budget
        self._name = name
        self._groups: OrderedDict[tuple[object, ...], deque[Item]] = OrderedDict()
        self.num_rows = 0
        self._num_items = 0

    def __len__(self) -> int:
        return self._num_items

    def __iter__(self) -> Iterator[Item]:
        return (item for group in self._groups.values() for item in group)

    def put(self, item: Item, retry_after_s: Callable[[], float]) -> None:
        """Adds an item.

        Raises:
            Overloaded: a bound is reached; nothing was queued.
        """
        if self._num_items >= self._spec.max_queued_requests:
            raise Overloaded(
                f"the queue of {self._name} is full: {self._num_items} requests wait, the limit is "
                f"{self._spec.max_queued_requests}; send the request again later",
                retry_after_s(),
            )
        if self._budget.used + item.num_bytes > self._budget.limit:
            raise Overloaded(
                f"the queue of this replica is full: {self._budget.used} bytes wait and this request has "
                f"{item.num_bytes}, the limit is {self._budget.limit}; send it again later, or a smaller one",
                retry_after_s(),
            )
        item.key = tuple((name, array.shape[1:]) for name, array in item.inputs.items())
        self._groups.setdefault(item.key, deque()).append(item)
        self._num_items += 1
        self.num_rows += item.num_rows
        self._budget.used += item.num_bytes

    def take(self, can_merge: bool) -> list[Item]:
        """Removes and returns what the next run shall hold: of the group whose turn it is, as many rows as fit."""
        if not self._groups:
            return []
        key, group = next(iter(self._groups.items()))
        batch = [group.popleft()]
        num_rows = batch[0].num_rows
        while can_merge and group and num_rows + group[0].num_rows <= self._spec.max_batch_size:
            batch.append(group.popleft())
            num_rows += batch[-1].num_rows
        if group:
            self._groups.move_to_end(key)
        else:
            del self._groups[key]
        for item in batch:
            self._forget(item)
        return batch

    def remove(self, item: Item) -> None:
        """Takes one item out, if it is still there."""
        group = self._groups.get(item.key)
        if group is None or item not in group:
            return
        group.remove(item)
        self._forget(item)
        if not group:
            del self._groups[item.key]

    def _forget(self, item: Item) -> None:
        self._num_items -= 1
        self.num_rows -= item.num_rows
        self._budget.used -= item.num_bytes
