"""The interface for reading rows by index, and its implementation for a table in memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from maas_ray.errors import DataError


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; may have no rows."""

    columns: list[Tensor]
    """Encoded columns in the order of the features, each [B, …]."""
    target: Tensor
    """[B]: int64 class codes, or float32 (a number in the units in which the network learns); or int64 [B, T] token ids, -100 where a token is ignored."""
    positions: Tensor
    """int64 [B]: position of each row in the endless stream of epochs, independent of rank, world and batch size."""
    weight: Tensor | None = None
    """float32 [B]: the weight of each row; None: every row has the weight 1."""

    @property
    def num_rows(self) -> int:
        """Rows in this micro-batch."""
        return int(self.target.shape[0])


class Rows(Protocol):
    """All rows of a split. Several ranks may read the same rows; the content does not depend on the reader."""

    def __len__(self) -> int: ...

    def take(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
        """The rows `ids` [B], at `positions` [B] of the endless stream; a row's randomness depends on its position."""
        ...


class Table:
    """Rows in memory.

    Args:
        columns: encoded columns [N, …].
        target: [N].
        weight: float32 [N], or None.

    Raises:
        DataError: no rows, or columns of different lengths.
    """

    def __init__(
        self, columns: Sequence[NDArray[Any]], target: NDArray[Any], weight: NDArray[Any] | None = None
    ) -> None:
        if not len(target):
            raise DataError("the split has no rows to load")
        lengths = {len(values) for values in (*columns, target)}
        if len(lengths) > 1 or not columns:
            raise DataError(
                f"{len(columns)} columns and the target have {sorted(lengths)} rows; at least one column is needed, "
                "and all must have the same number of rows"
            )
        self._target = torch.from_numpy(_writable(target))
        self._weight = None if weight is None else torch.from_numpy(_writable(weight))
        self._stacks, self._is_joined, self._places = _stack(columns)

    def __len__(self) -> int:
        return len(self._target)

    def take(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
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
            None if self._weight is None else self._weight.index_select(0, index),
        )


def _stack(columns: Sequence[NDArray[Any]]) -> tuple[list[Tensor], list[bool], list[tuple[int, int]]]:
    """Concatenates all columns [N, 1] of one dtype into one tensor, so that a batch is gathered once per dtype.

    Returns:
        The tensors, whether each is concatenated from columns, and per column the index of its tensor and in it.
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
    """A contiguous and writable array, which torch requires even for reading; copies only if necessary."""
    return np.require(values, requirements=["C", "W"])
