"""Reads the rows of the next steps in a background thread. Independent of steps and models.

torch's DataLoader would read them in separate processes, which take seconds to start and copy every row to hand it
over. Here a thread calls the loader: torch and Arrow gather the rows and release the GIL meanwhile.
"""

import queue
import threading
from collections.abc import Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.rows import Batch
from maas_ray.errors import DataError

_LOOK_S = 0.2
"""Interval at which a waiting thread checks that the other thread is still alive."""


class Prefetcher:
    """Returns a loader's batches, read ahead. A context manager; must be closed.

    Args:
        loader: from now on read by this object's thread alone.
        cursor: first global position.
        stop: position at which the run ends.
        stride: positions from one call to the next: the global batch.
        depth: maximum number of steps that are read ahead.
        pin: whether their tensors are copied to pinned memory, from which a GPU copies asynchronously.
        timeout_s: longest wait for one step's rows.
    """

    def __init__(
        self, loader: Loader, *, cursor: int, stop: int, stride: int, depth: int, pin: bool, timeout_s: float
    ) -> None:
        self._loader = loader
        self._stop, self._pin, self._timeout_s = stop, pin, timeout_s
        self._ready: queue.Queue[tuple[int, list[Batch] | Exception]] = queue.Queue(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(range(cursor, stop, stride),), name="prefetch", daemon=True
        )
        self._thread.start()

    def load(self, cursor: int, stop: int) -> list[Batch]:
        """Returns the result of `Loader.load` for these positions, which must be the next ones.

        Raises:
            DataError: they are not the next ones, or reading took too long.
            Exception: any exception that reading them raised.
        """
        waited_s = 0.0
        while True:
            is_reading = self._thread.is_alive()  # checked before the queue: the thread may end in between
            try:
                position, found = self._ready.get(timeout=_LOOK_S)
                break
            except queue.Empty:
                waited_s += _LOOK_S
                if waited_s >= self._timeout_s or not is_reading:
                    raise DataError(
                        f"the rows from position {cursor} on were not read within {self._timeout_s:.0f} s; check the "
                        "store's health, or raise workers.timeout_s"
                    ) from None
        if isinstance(found, Exception):
            raise found
        if (position, self._stop) != (cursor, stop):
            raise DataError(
                f"requested the rows from position {cursor} to {stop}; the rows read ahead are from {position} to "
                f"{self._stop}"
            )
        return found

    def close(self) -> None:
        """Stops the thread and discards the rows that it has read."""
        self._closing.set()
        self._thread.join(timeout=self._timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, cursors: Sequence[int]) -> None:
        for cursor in cursors:
            found: list[Batch] | Exception
            try:
                found = self._loader.load(cursor, self._stop)
                if self._pin:
                    found = [_pinned(batch) for batch in found]
            except Exception as error:  # raised by `load`
                found = error
            while not self._closing.is_set():
                try:
                    self._ready.put((cursor, found), timeout=_LOOK_S)
                    break
                except queue.Full:
                    continue
            if self._closing.is_set() or isinstance(found, Exception):
                return


def _pinned(batch: Batch) -> Batch:
    weight = None if batch.weight is None else batch.weight.pin_memory()
    columns = [column.pin_memory() for column in batch.columns]
    return replace(batch, columns=columns, target=batch.target.pin_memory(), weight=weight)
