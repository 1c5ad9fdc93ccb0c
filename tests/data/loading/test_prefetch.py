"""Prefetching: the same rows in the same order, errors raised by `load`, and no leftover threads."""

import threading
from typing import Any

import numpy as np
import pytest
import torch

from maas_ray.data.loading.loader import Batch, Loader
from maas_ray.data.loading.prefetch import Prefetcher
from maas_ray.errors import DataError

STOP, STRIDE = 100, 12


def _loader() -> Loader:
    rows = np.arange(40, dtype=np.float32)[:, None]
    return Loader([rows], np.arange(40), seed=3, global_batch=STRIDE, rank=1, world=2, accumulation_steps=2)


def _ahead(loader: Any, cursor: int = 0, depth: int = 2) -> Prefetcher:
    return Prefetcher(loader, cursor=cursor, stop=STOP, stride=STRIDE, depth=depth, pin=False, timeout_s=5.0)


class _Counting(Loader):
    """Counts reads, and fails at a given one."""

    def __init__(self, fails_at: int | None = None) -> None:
        self._inner = _loader()
        self._fails_at = fails_at
        self.num_read = 0

    def load(self, cursor: int, stop: int) -> list[Batch]:
        if cursor == self._fails_at:
            raise DataError("a part is gone")
        self.num_read += 1
        return self._inner.load(cursor, stop)


@pytest.mark.parametrize("start", [0, 3 * STRIDE])
@pytest.mark.parametrize("depth", [1, 3])
def test_rows_and_their_order_are_the_same_from_any_cursor_on(start: int, depth: int) -> None:
    plain = _loader()
    with _ahead(_loader(), start, depth) as ahead:
        for cursor in range(start, STOP, STRIDE):
            for given, expected in zip(ahead.load(cursor, STOP), plain.load(cursor, STOP), strict=True):
                assert torch.equal(given.columns[0], expected.columns[0])
                assert torch.equal(given.target, expected.target)
                assert torch.equal(given.positions, expected.positions)


def test_an_error_arrives_where_its_rows_are_asked_for() -> None:
    with _ahead(_Counting(fails_at=2 * STRIDE), depth=5) as ahead:
        ahead.load(0, STOP)
        ahead.load(STRIDE, STOP)
        with pytest.raises(DataError, match="a part is gone"):
            ahead.load(2 * STRIDE, STOP)


def test_rows_of_another_position_are_never_given() -> None:
    with (
        _ahead(_loader()) as ahead,
        pytest.raises(DataError, match="from position 12 to 100; the rows read ahead are from 0"),
    ):
        ahead.load(STRIDE, STOP)
    with _ahead(_loader()) as ahead:
        for cursor in range(0, STOP, STRIDE):
            ahead.load(cursor, STOP)
        with pytest.raises(DataError, match="the rows from position 108 on were not read"):
            ahead.load(108, STOP)


def test_prefetching_is_bounded_and_leaves_no_thread() -> None:
    before = threading.active_count()
    loader = _Counting()
    ahead = _ahead(loader, depth=2)
    ahead.load(0, STOP)
    ahead.load(STRIDE, STOP)
    ahead.close()
    assert loader.num_read <= 2 + 2 + 1  # given, ready, and one in the thread's hand
    assert threading.active_count() == before
