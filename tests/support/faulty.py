"""Stores that fail on purpose: one dies before or after its n-th operation, one reports a fault and continues."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

from maas_ray.errors import StoreDenied, StoreError, StoreUnavailable
from maas_ray.store.objects import ObjectInfo, ObstoreStore

T = TypeVar("T")


class Died(BaseException):
    """The process is gone. Not an Exception, so that no handler of the code under test can continue."""


class WrappedStore:
    """Forwards to a store and counts the operations that change it; subclasses override the operations that fail."""

    def __init__(self, store: ObstoreStore) -> None:
        self.uri = store.uri
        self.root = store.root
        self.num_operations = 0
        self._store = store
        self._lock = threading.Lock()

    def create(self, key: str, data: bytes) -> None:
        self._change(key, lambda: self._store.create(key, data))

    def put(self, key: str, data: bytes | memoryview) -> None:
        self._change(key, lambda: self._store.put(key, data))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._change(key, lambda key=key: self._store.delete([key]))

    def delete_staged(self, info: ObjectInfo) -> None:
        self._change(info.key, lambda: self._store.delete_staged(info))

    def get(self, key: str) -> bytes:
        return self._alive().get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._alive().get_ranges(key, ranges)

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        return self._alive().scan(prefix, after)

    def children(self, prefix: str) -> list[str]:
        return self._alive().children(prefix)

    def odd(self) -> list[str]:
        return self._alive().odd()

    def staged(self) -> Iterator[ObjectInfo]:
        return self._alive().staged()

    def _count(self) -> int:
        with self._lock:
            self.num_operations += 1
            return self.num_operations

    def _alive(self) -> ObstoreStore:
        return self._store

    def _change(self, key: str, operation: Callable[[], Any]) -> Any:
        self._count()
        return operation()


class DyingStore(WrappedStore):
    """A store that dies before or after its n-th operation, as a killed process would: nothing is done afterwards.

    Args:
        store: the real store.
        dies_at: number of the operation, from 1; None: never, only count.
        after: whether the operation takes place before the death.
    """

    def __init__(self, store: ObstoreStore, dies_at: int | None = None, after: bool = False) -> None:
        super().__init__(store)
        self._dies_at = dies_at
        self._after = after
        self._is_dead = False

    def _alive(self) -> ObstoreStore:
        if self._is_dead:
            raise Died
        return self._store

    def _change(self, key: str, operation: Callable[[], T]) -> T:
        self._alive()
        if self._count() == self._dies_at:
            self._is_dead = True
            if self._after:
                operation()
            raise Died
        return operation()


FAULTS: dict[str, tuple[bool, Callable[[str], StoreError]]] = {
    # name: (whether the operation takes place, what the store says)
    "I/O error": (False, lambda key: StoreDenied(f"cannot use {key}: Input/output error")),
    "no space": (False, lambda key: StoreError(f"no space is left for {key}")),
    "503": (False, lambda key: StoreUnavailable(f"the store did not respond for {key} within the retry limit: 503")),
    "timeout after success": (True, lambda key: StoreUnavailable(f"the store did not respond for {key}: timed out")),
}


class FaultyStore(WrappedStore):
    """A store whose n-th operation reports a fault, as `ObstoreStore` does; everything else works.

    Args:
        store: the real store.
        fault: one of `FAULTS`.
        at: number of the operation, from 1, and all after it if `is_lasting`.
        where: only keys that contain this count as operations.
    """

    def __init__(
        self, store: ObstoreStore, fault: str, at: int | None = None, *, where: str = "", is_lasting: bool = False
    ) -> None:
        super().__init__(store)
        self._takes_place, self._error = FAULTS[fault]
        self._at = at
        self._where = where
        self._is_lasting = is_lasting

    def _change(self, key: str, operation: Callable[[], T]) -> T:
        number = self._count() if self._where in key else 0
        if self._at is None or not (number == self._at or (self._is_lasting and number > self._at)):
            return operation()
        if self._takes_place:
            operation()
        raise self._error(key)
