"""Many objects at a time: a few requests in flight, so that a hundred objects do not take a hundred times as long."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from maas_ray.errors import MaasError, NotFound
from maas_ray.store.objects import ObjectStore

MAX_PARALLEL = 16
"""Requests in flight at most."""

T = TypeVar("T")
R = TypeVar("R")


def get_each(store: ObjectStore, keys: Iterable[str]) -> list[bytes | NotFound]:
    """The bytes of every key in the order of the keys, or that there is no such object.

    Raises:
        StoreError: the store failed in another way for at least one of them.
    """

    def get(key: str) -> bytes | NotFound:
        try:
            return store.get(key)
        except NotFound as error:
            return error

    return in_parallel(get, keys)


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """`work` of each item, in order, at most `MAX_PARALLEL` at a time; the first error is raised."""
    todo = list(items)
    if len(todo) < 2:
        return [work(item) for item in todo]
    with ThreadPoolExecutor(min(MAX_PARALLEL, len(todo)), thread_name_prefix="store") as threads:
        running = [threads.submit(work, item) for item in todo]
        try:
            return [each.result() for each in running]
        except BaseException:
            for each in running:
                each.cancel()
            raise


def attempt(work: Callable[[T], R]) -> Callable[[T], R | MaasError]:
    """`work`, with what is wrong with one item as its result, for lists whose other items count.

    An error that a retry may mend is raised all the same: the store is away, which says nothing about the item.
    """

    def attempted(item: T) -> R | MaasError:
        try:
            return work(item)
        except MaasError as error:
            if error.retryable:
                raise
            return error

    return attempted
