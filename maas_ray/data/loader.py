"""Micro-batches of one rank for any stretch of the global sample order. Knows no epoch, step or process group."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maas_ray.data.order import sample_ids
from maas_ray.errors import DataError

_CHUNK = 4096
"""Positions whose ids are computed at once: one permutation of many costs little more than one of few."""


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; may have no rows."""

    columns: list[Tensor]
    """Encoded columns in the order of the features, each [B, …]."""
    target: Tensor
    """[B]: int64 class codes, or float32."""
    positions: Tensor
    """int64 [B]: place of each row in the endless stream of epochs, which no rank, world size or batch size changes."""

    @property
    def num_rows(self) -> int:
        """Rows in this micro-batch."""
        return int(self.target.shape[0])


class Loader:
    """Gives each rank its share of every global batch; the state is one integer, the cursor.

    The rows of a global batch and their order depend on (seed, cursor, global_batch) alone, not on the number of ranks.

    Args:
        columns: encoded columns [N, …].
        target: [N].
        seed: of the sample order.
        global_batch: rows of one optimizer step over all ranks.
        rank: this process, in [0, world).
        world: number of processes.
        accumulation: micro-batches per optimizer step and rank.

    Raises:
        DataError: no rows, columns of different lengths, or a number out of its range.
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
        accumulation: int = 1,
    ) -> None:
        if not len(target):
            raise DataError("the split has no rows to load")
        lengths = {len(values) for values in (*columns, target)}
        if len(lengths) > 1 or not columns:
            raise DataError(
                f"{len(columns)} columns and the target have {sorted(lengths)} rows; all must have the same"
            )
        if global_batch < 1 or accumulation < 1 or not 0 <= rank < world:
            raise DataError(
                f"global_batch {global_batch} and accumulation {accumulation} must be at least 1, "
                f"and rank {rank} in [0, {world})"
            )
        self.num_rows = len(target)
        self._seed = seed
        self._global_batch = global_batch
        self._rank, self._world = rank, world
        self._accumulation = accumulation
        self._target = torch.from_numpy(_writable(target))
        self._stacks, self._is_joined, self._places = _stack(columns)
        self._chunk_start = 0
        self._chunk: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def load(self, cursor: int, stop: int) -> list[Batch]:
        """This rank's micro-batches for global positions [cursor, min(cursor + global_batch, stop)).

        Position p belongs to the rank (p - cursor) % world.

        Args:
            cursor: first global position.
            stop: position at which the stretch ends although the global batch is not full (the end of an epoch).

        Returns:
            Exactly `accumulation` micro-batches, whose sizes differ by at most one row; some may be empty.

        Raises:
            DataError: the stretch is empty or negative.
        """
        end = min(cursor + self._global_batch, stop)
        if not 0 <= cursor < end:
            raise DataError(f"no positions to load from {cursor} to {stop}")
        own = self._ids(cursor, end)[self._rank :: self._world]
        positions = np.arange(cursor + self._rank, end, self._world, dtype=np.int64)
        pieces = zip(
            np.array_split(own, self._accumulation), np.array_split(positions, self._accumulation), strict=True
        )
        return [self._batch(ids, places) for ids, places in pieces]

    def _ids(self, start: int, end: int) -> NDArray[np.int64]:
        first = start - self._chunk_start
        last = end - self._chunk_start
        if not (first >= 0 and last <= len(self._chunk)):
            self._chunk = sample_ids(self._seed, self.num_rows, start, max(_CHUNK, end - start))
            self._chunk_start = start
            first, last = 0, end - start
        return self._chunk[first:last]

    def _batch(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
        index = torch.from_numpy(ids)
        taken = [stack.index_select(0, index) for stack in self._stacks]
        columns = [
            torch.split(rows, 1, dim=1) if is_joined else (rows,)
            for rows, is_joined in zip(taken, self._is_joined, strict=True)
        ]
        return Batch(
            [columns[stack][place] for stack, place in self._places],
            self._target.index_select(0, index),
            torch.from_numpy(positions),
        )


def _stack(columns: Sequence[NDArray[Any]]) -> tuple[list[Tensor], list[bool], list[tuple[int, int]]]:
    """Joins all columns [N, 1] of one dtype into one tensor, so that a batch is gathered once per dtype.

    Returns:
        The tensors, whether each is joined of columns, and per column its tensor and its place in it.
    """
    groups: dict[Any, list[int]] = {}
    for i, values in enumerate(columns):
        is_narrow = values.ndim == 2 and values.shape[1] == 1
        groups.setdefault(values.dtype if is_narrow else i, []).append(i)
    stacks: list[Tensor] = []
    is_joined: list[bool] = []
    places: dict[int, tuple[int, int]] = {}
    for key, members in groups.items():
        places.update({i: (len(stacks), place) for place, i in enumerate(members)})
        is_joined.append(not isinstance(key, int))
        joined = np.concatenate([columns[i] for i in members], axis=1) if is_joined[-1] else columns[key]
        stacks.append(torch.from_numpy(_writable(joined)))
    return stacks, is_joined, [places[i] for i in range(len(columns))]


def _writable(values: NDArray[Any]) -> NDArray[Any]:
    """Contiguous and writable, which torch wants even of what it only reads; copies only if it must."""
    return np.require(values, requirements=["C", "W"])
