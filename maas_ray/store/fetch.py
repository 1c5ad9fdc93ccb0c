"""Reads many objects with a few requests in flight, so that a hundred objects do not take a hundred times as long."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from maas_ray.errors import MaasError, NotFound
from maas_ray.store.objects import ObjectStore

MAX_PARALLEL = 16
"""Maximum number of requests in flight."""

T = TypeVar("T")
R = TypeVar("R")


def get_each(store: ObjectStore, keys: Iterable[str]) -> list[bytes | NotFound]:
    """The bytes of every key in the order of the keys, or the `NotFound` error if there is no such object.

    Raises:
        StoreError: the store failed otherwise for at least one of them.
    """

    def get(key: str) -> bytes | NotFound:
        try:
            return store.get(key)
        except NotFound as error:
            return error

    return in_parallel(get, keys)


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Applies `work` to each item, at most `MAX_PARALLEL` at a time; results are in order; raises the first error."""
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
    """Wraps `work` to return the error of one item as its result, for lists whose other items must be processed.

    An error that a retry may fix is raised nevertheless: the store is unavailable, which does not concern the item.
    """

    def attempted(item: T) -> R | MaasError:
        try:
            return work(item)
        except MaasError as error:
            if error.retryable:
                raise
            return error

    return attempted
