"""Micro-batches of one rank for any range of the global sample order. Independent of epochs and process groups."""

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from maas_ray.data.loading.order import sample_ids
from maas_ray.data.loading.rows import Batch, Rows, Table
from maas_ray.errors import DataError

__all__ = ["Batch", "Loader"]

_CHUNK = 4096
"""Positions whose sample ids are computed at once: a long permutation costs little more than a short one."""


class Loader:
    """Loads one rank's share of every global batch; the only state is the cursor, an integer.

    The rows of a global batch and their order depend on (seed, cursor, global_batch) alone, not on the number of ranks.

    Args:
        columns: encoded columns [N, …].
        target: [N].
        seed: seed of the sample order.
        global_batch: rows per optimizer step over all ranks.
        rank: this process, in [0, world).
        world: number of processes.
        accumulation_steps: micro-batches per optimizer step and rank.

    Raises:
        DataError: no rows, columns of different lengths, or an argument out of range.
    """

    def __init__(
        self,
        columns: Sequence[NDArray[Any]],
        target: NDArray[Any],
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        accumulation_steps: int = 1,
    ) -> None:
        self._set_up(Table(columns, target), seed, global_batch, rank, world, accumulation_steps)

    @classmethod
    def over(
        cls, rows: Rows, *, seed: int, global_batch: int, rank: int, world: int, accumulation_steps: int = 1
    ) -> Self:
        """A loader of rows that need not be in memory; otherwise as the constructor."""
        loader = cls.__new__(cls)
        loader._set_up(rows, seed, global_batch, rank, world, accumulation_steps)
        return loader

    def _set_up(self, rows: Rows, seed: int, global_batch: int, rank: int, world: int, accumulation_steps: int) -> None:
        if global_batch < 1 or accumulation_steps < 1 or not 0 <= rank < world:
            raise DataError(
                f"global_batch {global_batch} and accumulation_steps {accumulation_steps} must be at least 1, "
                f"and rank {rank} in [0, {world})"
            )
        self.num_rows = len(rows)
        self._rows = rows
        self._seed = seed
        self._global_batch = global_batch
        self._rank, self._world = rank, world
        self._accumulation = accumulation_steps
        self._chunk_start = 0
        self._chunk: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def load(self, cursor: int, stop: int) -> list[Batch]:
        """Loads this rank's micro-batches for global positions [cursor, min(cursor + global_batch, stop)).

        Position p belongs to rank (p - cursor) % world.

        Args:
            cursor: first global position.
            stop: position at which the range ends even if the global batch is not full (the end of an epoch).

        Returns:
            Exactly `accumulation_steps` micro-batches, whose sizes differ by at most one row; some may be empty.

        Raises:
            DataError: the range is empty or negative.
        """
        end = min(cursor + self._global_batch, stop)
        if not 0 <= cursor < end:
            raise DataError(f"the range of positions from {cursor} to {stop} is empty or negative")
        own = self._ids(cursor, end)[self._rank :: self._world]
        positions = np.arange(cursor + self._rank, end, self._world, dtype=np.int64)
        pieces = zip(
            np.array_split(own, self._accumulation), np.array_split(positions, self._accumulation), strict=True
        )
        return [self._rows.take(ids, places) for ids, places in pieces]

    def _ids(self, start: int, end: int) -> NDArray[np.int64]:
        first = start - self._chunk_start
        last = end - self._chunk_start
        if not (first >= 0 and last <= len(self._chunk)):
            self._chunk = sample_ids(self._seed, self.num_rows, start, max(_CHUNK, end - start))
            self._chunk_start = start
            first, last = 0, end - start
        return self._chunk[first:last]
