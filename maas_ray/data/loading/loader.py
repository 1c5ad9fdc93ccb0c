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
        min_rows: smallest number of rows of a micro-batch that is not empty, for a model that mixes the rows of a batch.

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
        min_rows: int = 1,
    ) -> None:
        self._set_up(Table(columns, target), seed, global_batch, rank, world, accumulation_steps, min_rows)

    @classmethod
    def over(
        cls,
        rows: Rows,
        *,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        accumulation_steps: int = 1,
        min_rows: int = 1,
    ) -> Self:
        """A loader of rows that need not be in memory; otherwise as the constructor."""
        loader = cls.__new__(cls)
        loader._set_up(rows, seed, global_batch, rank, world, accumulation_steps, min_rows)
        return loader

    def _set_up(
        self,
        rows: Rows,
        seed: int,
        global_batch: int,
        rank: int,
        world: int,
        accumulation_steps: int,
        min_rows: int,
    ) -> None:
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
        self._accumulation, self._min_rows = accumulation_steps, min_rows
        self._chunk_start = 0
        self._chunk: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def load(self, cursor: int, stop: int) -> list[Batch]:
        """Loads this rank's micro-batches for global positions [cursor, min(cursor + global_batch, stop)).

        Position p belongs to rank (p - cursor) % world, unless a micro-batch would then have fewer than `min_rows` rows:
        fewer micro-batches, of at least that size, then share all rows, and the others are empty.

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
        ids = self._ids(cursor, end)
        places = share_out(end - cursor, self._rank, self._world, self._accumulation, self._min_rows)
        return [self._rows.take(ids[own], cursor + own) for own in places]

    def _ids(self, start: int, end: int) -> NDArray[np.int64]:
        first = start - self._chunk_start
        last = end - self._chunk_start
        if not (first >= 0 and last <= len(self._chunk)):
            self._chunk = sample_ids(self._seed, self.num_rows, start, max(_CHUNK, end - start))
            self._chunk_start = start
            first, last = 0, end - start
        return self._chunk[first:last]


def share_out(
    num_rows: int, rank: int, world: int, accumulation_steps: int = 1, min_rows: int = 1
) -> list[NDArray[np.int64]]:
    """The rows of a global batch that are in each micro-batch of a rank; see `Loader.load`.

    Args:
        num_rows: rows of the global batch.
        rank: in [0, world).
        world: number of ranks.
        accumulation_steps: micro-batches per rank.
        min_rows: smallest number of rows of a micro-batch that is not empty; a batch with fewer rows is one micro-batch.

    Returns:
        Per micro-batch, int64 indices in [0, num_rows), ascending.
    """
    if min_rows == 1 or num_rows // world // accumulation_steps >= min_rows:
        own = np.arange(rank, num_rows, world, dtype=np.int64)
        return np.array_split(own, accumulation_steps)
    num_filled = max(1, num_rows // min_rows)
    numbers = (step * world + rank for step in range(accumulation_steps))
    return [np.arange(number, num_rows if number < num_filled else 0, num_filled, dtype=np.int64) for number in numbers]
