"""Priority heap of waiting items, lowest rank first. Independent of requests, models and time."""

import heapq
from collections import deque
from collections.abc import Iterator
from typing import Any, Generic, Protocol, TypeVar


class Ranked(Protocol):
    """Type of the items of a heap."""

    rank: tuple[Any, ...]
    """Position in the order; no two are equal."""
    is_waiting: bool
    """False once it has been removed; the heap drops it when it reaches it."""


T = TypeVar("T", bound=Ranked)


class PriorityHeap(Generic[T]):
    """Waiting items by rank. Items that arrive in order are appended and popped in constant time; the rest is a heap.

    Remove an item with `is_waiting = False` and `num_waiting -= 1`, also in constant time. The removed items that
    are still stored are never more than twice the waiting ones plus 64.
    """

    __slots__ = ("_heap", "_sorted", "num_waiting")

    def __init__(self) -> None:
        self._sorted: deque[T] = deque()
        self._heap: list[tuple[tuple[Any, ...], T]] = []
        self.num_waiting = 0

    def __iter__(self) -> Iterator[T]:
        """Iterates over all waiting items, in no particular order."""
        yield from (thing for thing in self._sorted if thing.is_waiting)
        yield from (thing for _, thing in self._heap if thing.is_waiting)

    def add(self, thing: T) -> None:
        """Adds a waiting item."""
        in_order = self._sorted
        if not in_order or in_order[-1].rank < thing.rank:
            in_order.append(thing)
        else:
            heapq.heappush(self._heap, (thing.rank, thing))
        self.num_waiting += 1
        if len(in_order) + len(self._heap) > 3 * self.num_waiting + 64:
            self._sorted = deque(thing for thing in in_order if thing.is_waiting)
            self._heap = [entry for entry in self._heap if entry[1].is_waiting]
            heapq.heapify(self._heap)

    def first(self) -> T:
        """Returns the waiting item of lowest rank.

        Raises:
            IndexError: nothing waits.
        """
        in_order, heap = self._sorted, self._heap
        while in_order and not in_order[0].is_waiting:
            in_order.popleft()
        while heap and not heap[0][1].is_waiting:
            heapq.heappop(heap)
        if heap and (not in_order or heap[0][0] < in_order[0].rank):
            return heap[0][1]
        return in_order[0]

    def drain(self) -> Iterator[T]:
        """Yields the waiting items, lowest rank first; each must be removed before the next one is requested."""
        in_order, heap = self._sorted, self._heap
        while in_order or heap:
            if heap:
                try:
                    thing = self.first()
                except IndexError:
                    return
                yield thing
            elif (thing := in_order[0]).is_waiting:
                yield thing
            else:
                in_order.popleft()

    def clear(self) -> None:
        """Drops all entries; for a heap in which nothing waits any more."""
        self._sorted.clear()
        self._heap.clear()

    def last(self) -> T:
        """Returns the waiting item of highest rank among those that arrived in order; if there is none, any other.

        Raises:
            IndexError: nothing waits.
        """
        in_order, heap = self._sorted, self._heap
        while in_order and not in_order[-1].is_waiting:
            in_order.pop()
        if in_order:
            return in_order[-1]
        while not heap[-1][1].is_waiting:
            heap.pop()
        return heap[-1][1]
