"""A store that dies before or after its n-th operation, as a killed process would: nothing is done afterwards."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from maas_ray.store.objects import ObjectInfo, ObstoreStore

T = TypeVar("T")


class Died(BaseException):
    """The process is gone. Not an Exception, so that no handler of the code under test can go on."""


class DyingStore:
    """Counts operations that change the store and dies at one of them.

    Args:
        store: the real store.
        dies_at: number of the operation, from 1; None: never, only count.
        after: whether the operation takes place before the death.
    """

    def __init__(self, store: ObstoreStore, dies_at: int | None = None, after: bool = False) -> None:
        self.uri = store.uri
        self.root = store.root
        self.num_operations = 0
        self._store = store
        self._dies_at = dies_at
        self._after = after
        self._is_dead = False

    def put_new(self, key: str, data: bytes) -> None:
        self._change(lambda: self._store.put_new(key, data))

    def put(self, key: str, data: bytes) -> None:
        self._change(lambda: self._store.put(key, data))

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._change(lambda key=key: self._store.delete([key]))

    def get(self, key: str) -> bytes:
        return self._alive().get(key)

    def scan(self, prefix: str, after: str | None = None) -> Iterator[ObjectInfo]:
        return self._alive().scan(prefix, after)

    def children(self, prefix: str) -> list[str]:
        return self._alive().children(prefix)

    def staged(self) -> Iterator[ObjectInfo]:
        return self._alive().staged()

    def _alive(self) -> ObstoreStore:
        if self._is_dead:
            raise Died
        return self._store

    def _change(self, operation: Callable[[], T]) -> T:
        self._alive()
        self.num_operations += 1
        if self.num_operations == self._dies_at:
            self._is_dead = True
            if self._after:
                operation()
            raise Died
        return operation()
