"""A store that counts what is asked of it, and answers as late as one that is far away."""

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from maas_ray.store.objects import ObjectInfo, ObstoreStore

PAGE = 1000
"""Objects that S3 lists at a time."""


@dataclass
class Counts:
    """Requests to a store."""

    gets: int = 0
    lists: int = 0
    """Pages of listings."""
    puts: int = 0
    deletes: int = 0


class SlowStore(ObstoreStore):
    """The real store, counted.

    Args:
        store: the real one.
        get_s: seconds that each get takes longer.
        list_s: seconds that each page of a listing takes longer.
    """

    def __init__(self, store: ObstoreStore, get_s: float = 0.0, list_s: float = 0.0) -> None:
        super().__init__(store.uri, store._backend, store._directory, store.spec)
        self.counts = Counts()
        self._get_s, self._list_s = get_s, list_s
        self._lock = threading.Lock()

    def taken(self) -> Counts:
        """What was asked since the last call."""
        with self._lock:
            found, self.counts = self.counts, Counts()
        return found

    def get(self, key: str) -> bytes:
        self._count("gets", self._get_s)
        return super().get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        self._count("gets", self._get_s)
        return super().get_ranges(key, ranges)

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._count("puts")
        super().put(key, data)

    def create(self, key: str, data: bytes) -> None:
        self._count("puts")
        super().create(key, data)

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        self._count("lists", self._list_s)
        for number, info in enumerate(super().scan(prefix, after), start=1):
            yield info
            if number % PAGE == 0:
                self._count("lists", self._list_s)

    def children(self, prefix: str) -> list[str]:
        found = super().children(prefix)
        for _ in range(1 + len(found) // PAGE):
            self._count("lists", self._list_s)
        return found

    def delete(self, keys: Iterable[str]) -> None:
        names = list(keys)
        for _ in names:
            self._count("deletes")
        super().delete(names)

    def _count(self, what: str, pause_s: float = 0.0) -> None:
        with self._lock:
            setattr(self.counts, what, getattr(self.counts, what) + 1)
        if pause_s:
            time.sleep(pause_s)
