"""The format of one shard: a few arrays with one entry per row, for random access. Independent of stores and splits.

    numbers     float32 [K] per row: the other numeric columns, raw; NaN is missing
    codes       int32 [C] per row: the categorical columns as indices into their dictionaries (`shard_layout.py`)
    tensor <i>  float32 or uint8 per row: the i-th tensor, flat; or float64: a number or a date that float32 would round
    target      int64 class code, or float32
    weight      float32: the weight of the row, if the data set has weights

A shard is an Arrow IPC file with one record batch, whose buffers are the arrays: mapping it copies nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.arrays import Array
from maas_ray.data.spec.features import Column, Features, TensorColumn, is_wide
from maas_ray.errors import ObjectCorrupt

Dictionaries = Mapping[str, Sequence[str] | Sequence[int]]


@dataclass(frozen=True)
class Block:
    """Rows of one or several shards."""

    numbers: NDArray[np.float32]
    """[N, K]"""
    codes: NDArray[np.int32]
    """[N, C]"""
    tensors: tuple[Array, ...]
    """[N, *shape] each."""
    target: Array
    """[N]"""
    weight: Array | None = None
    """float32 [N]; None: every row has the weight 1."""

    def __len__(self) -> int:
        return len(self.target)

    @property
    def nbytes(self) -> int:
        """Bytes of all rows."""
        return sum(values.nbytes for values in self._all())

    def take(self, ids: NDArray[np.int64]) -> "Block":
        """Copies the rows `ids`."""
        return self._like([values[ids] for values in self._all()])

    def slice(self, start: int, stop: int) -> "Block":
        """A view of the rows [start, stop)."""
        return self._like([values[start:stop] for values in self._all()])

    def put(self, ids: NDArray[np.int64], rows: "Block") -> None:
        """Overwrites the rows `ids`."""
        for mine, theirs in zip(self._all(), rows._all(), strict=True):
            mine[ids] = theirs

    def _all(self) -> list[Array]:
        weight = [] if self.weight is None else [self.weight]
        return [self.numbers, self.codes, self.target, *weight, *self.tensors]

    def _like(self, values: Sequence[Any]) -> "Block":
        """A block of other rows, from arrays in the order of `_all`."""
        first = 3 if self.weight is None else 4
        return Block(values[0], values[1], tuple(values[first:]), values[2], None if self.weight is None else values[3])


def join(blocks: Sequence[Block]) -> Block:
    """Concatenates the rows of all blocks."""
    if len(blocks) == 1:
        return blocks[0]
    return blocks[0]._like([np.concatenate(group) for group in zip(*(block._all() for block in blocks), strict=True)])


def pack(block: Block) -> pa.Buffer:
    """Serializes a shard; the same rows give the same bytes."""
    named = {"numbers": block.numbers, "codes": block.codes}
    named |= {f"tensor {i}": values.reshape(len(values), -1) for i, values in enumerate(block.tensors)}
    arrays: dict[str, pa.Array] = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(values).reshape(-1)), values.shape[1])
        for name, values in named.items()
        if values.shape[1]
    }
    arrays["target"] = pa.array(block.target)
    if block.weight is not None:
        arrays["weight"] = pa.array(block.weight)
    batch = pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue()


def unpack(features: Features, content: Any) -> Block:
    """The inverse of `pack`, without a copy: the arrays are read-only views of `content`.

    Args:
        features: features with the columns of the shard.
        content: the shard as bytes or mapped memory.

    Raises:
        ObjectCorrupt: the content is not a shard with these columns.
    """
    try:
        batch = pa.ipc.open_file(pa.py_buffer(content)).get_batch(0)
        num_rows = batch.num_rows
        found: dict[str, Array] = {}
        for name in batch.schema.names:
            column = batch.column(name)
            flat = column.flatten() if pa.types.is_fixed_size_list(column.type) else column
            values = flat.to_numpy(zero_copy_only=True)
            found[name] = values if name in ("target", "weight") else values.reshape(num_rows, -1)
        shapes = [shape for column in features.columns if (shape := _alone(column)) is not None]
        return Block(
            found.get("numbers", np.empty((num_rows, 0), dtype=np.float32)),
            found.get("codes", np.empty((num_rows, 0), dtype=np.int32)),
            tuple(found[f"tensor {i}"].reshape(num_rows, *shape) for i, shape in enumerate(shapes)),
            found["target"],
            None if features.weight is None else found["weight"],
        )
    except (pa.ArrowInvalid, KeyError, ValueError) as error:
        raise ObjectCorrupt(f"not a shard with the columns of its data set: {error}") from error


def raw_columns(
    features: Features, dictionaries: Dictionaries, blocks: Sequence[Block]
) -> tuple[list[Array], Array, Array | None]:
    """Copies of the columns, as in `Split`, of the target and of the weight."""
    rows = join(blocks)
    numbers, codes, tensors = iter(rows.numbers.T), iter(rows.codes.T), iter(rows.tensors)
    columns: list[Array] = []
    for column in features.columns:
        if column.kind == "numeric" and not is_wide(column):
            columns.append(np.array(next(numbers)).reshape(-1, 1))
        elif column.kind == "categorical":
            dictionary = np.array(dictionaries[column.name], object if column.datatype == "BYTES" else np.int64)
            columns.append(dictionary[next(codes)].reshape(-1, 1))
        else:
            columns.append(np.require(next(tensors), requirements=["C", "W"]))
    weight = None if rows.weight is None else np.require(rows.weight, requirements=["C", "W"])
    return columns, np.require(rows.target, requirements=["C", "W"]), weight


def _alone(column: Column) -> tuple[int, ...] | None:
    """The shape of a row of a column with an array of its own, or None."""
    if isinstance(column, TensorColumn):
        return column.shape
    return (1,) if is_wide(column) else None


def row_bytes(features: Features) -> int:
    """Bytes of one row of a shard."""
    sizes = {"numeric": 4, "categorical": 4}
    total = 8 + (4 if features.weight is not None else 0)
    for column in features.columns:
        if is_wide(column):
            total += 8
        elif isinstance(column, TensorColumn):
            total += prod(column.shape) * (1 if column.datatype == "UINT8" else 4)
        else:
            total += sizes.get(column.kind, 0)
    return total
