"""Random access to the rows of a large table in memory-mapped shards, whose pages all ranks of a machine share.

A shard is mapped, and every byte of it verified, before its first row is used. Pages that were read are released
regularly (they stay in the system's page cache), so a rank's memory is small and constant for a data set of any size.
"""

import mmap
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray

from maas_ray.data.loading import mmap_cache
from maas_ray.data.loading.encode import encode_column, narrow
from maas_ray.data.loading.rows import Batch
from maas_ray.data.loading.target_units import scaled_target
from maas_ray.data.spec.features import CategoricalColumn, Features, is_wide
from maas_ray.data.stored.shard import Block, row_bytes, unpack
from maas_ray.data.stored.shard_layout import Shard, ShardLayout
from maas_ray.errors import DataError, ObjectCorrupt
from maas_ray.store.manifest import Committed

MAX_MAPPED_BYTES = 1 << 26
"""Mapped memory that a rank keeps, by the estimate below; up to four times as much was measured."""
_NO_VALUE = "\0"
_FAULT_BYTES = 1 << 16
"""Bytes that one random read makes resident: Linux maps the 16 pages around it."""


class ShardRows:
    """All rows of a split.

    Args:
        committed: the committed data set with the shards.
        layout: index of the shards.
        features: description of the columns.
        split: name of the split.

    Raises:
        ObjectCorrupt: a shard is missing or truncated.
        DataError: the store is not a local directory, and the split is larger than the cache of this machine.
    """

    def __init__(self, committed: Committed, layout: ShardLayout, features: Features, split: str) -> None:
        self._committed = committed
        self._features = features
        self._shards: tuple[Shard, ...] = layout.shards[split]
        self._starts = np.array([0, *accumulate(shard.num_rows for shard in self._shards)], dtype=np.int64)
        self._blocks: list[Block | None] = [None] * len(self._shards)
        self._maps: list[mmap.mmap] = []
        self.resident_bytes = 0
        """Estimated bytes of the maps that were read since their pages were last given back."""
        self._codes, self._offsets = _model_codes(features, layout)
        num_arrays = (
            3 + (features.weight is not None) + sum(one.kind == "tensor" or is_wide(one) for one in features.columns)
        )
        self._row_bytes = num_arrays * _FAULT_BYTES + row_bytes(features)
        self._refuse_missing()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def take(self, ids: NDArray[np.int64], positions: NDArray[np.int64]) -> Batch:
        rows = self._gather(ids)
        codes = torch.from_numpy(self._codes[rows.codes + self._offsets])
        numbers = iter(torch.split(torch.from_numpy(rows.numbers), 1, dim=1) if rows.numbers.shape[1] else ())
        categories = iter(torch.split(codes, 1, dim=1) if codes.shape[1] else ())
        tensors = iter(rows.tensors)
        columns = [
            next(numbers)
            if column.kind == "numeric" and not is_wide(column)
            else next(categories)
            if column.kind == "categorical"
            else torch.from_numpy(narrow(column, next(tensors)))
            for column in self._features.columns
        ]
        weight = None if rows.weight is None else torch.from_numpy(rows.weight)
        target = torch.from_numpy(scaled_target(self._features.target_scaling, rows.target))
        return Batch(columns, target, torch.from_numpy(positions), weight)

    def _gather(self, ids: NDArray[np.int64]) -> Block:
        """Copies the rows from their shards."""
        if not len(ids):
            return _empty_like(self._open(0), 0)
        where = np.searchsorted(self._starts, ids, side="right") - 1
        order = np.argsort(where, kind="stable")
        places, firsts = np.unique(where[order], return_index=True)
        result = _empty_like(self._open(int(places[0])), len(ids))
        for shard, chosen in zip(places.tolist(), np.split(order, firsts[1:]), strict=True):
            result.put(chosen, self._open(shard).take(ids[chosen] - self._starts[shard]))
            self._give_back(len(chosen))
        return result

    def _open(self, number: int) -> Block:
        block = self._blocks[number]
        if block is None:
            name = self._shards[number].name
            mapped = mmap_cache.map_bytes(self._committed, name)
            mapped.madvise(mmap.MADV_RANDOM)
            mapped.madvise(mmap.MADV_DONTNEED)  # verification has read all pages
            block = self._blocks[number] = unpack(self._features, mapped)
            if len(block) != self._shards[number].num_rows:
                raise ObjectCorrupt(
                    f"{self._committed.parts[name].key} contains {len(block)} rows; its manifest lists "
                    f"{self._shards[number].num_rows}; restore it from a backup"
                )
            self._maps.append(mapped)
        return block

    def _give_back(self, num_rows: int) -> None:
        self.resident_bytes += num_rows * self._row_bytes
        if self.resident_bytes > MAX_MAPPED_BYTES:
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)
            self.resident_bytes = 0

    def _refuse_missing(self) -> None:
        size = 0
        for shard in self._shards:
            part = self._committed.parts.get(shard.name)
            if part is None:
                raise ObjectCorrupt(f"the manifest of {self._committed.prefix} has no part {shard.name!r}")
            size += part.size
            path = mmap_cache.local_path(self._committed, shard.name)
            if path is not None and not (path.is_file() and path.stat().st_size == part.size):
                raise ObjectCorrupt(
                    f"the committed object {part.key} is missing or is not {part.size} bytes long; restore it from a "
                    "backup"
                )
        if size > mmap_cache.MAX_CACHE_BYTES and mmap_cache.local_path(self._committed, self._shards[0].name) is None:
            raise DataError(
                f"the split has {size} bytes; the limit for caching a remote store on a machine is "
                f"{mmap_cache.MAX_CACHE_BYTES}; copy the data set to a directory that all machines share"
            )


def _model_codes(features: Features, layout: ShardLayout) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The model's codes for the stored codes of all categorical columns, concatenated, and each column's offset."""
    columns = [column for column in features.columns if isinstance(column, CategoricalColumn)]
    tables = []
    for column in columns:
        kind = object if column.datatype == "BYTES" else np.int64
        values = np.array(layout.dictionaries[column.name], dtype=kind).reshape(-1, 1)
        if column.fill is None and column.datatype == "BYTES":  # no missing value is left, so it has no code
            values[values == ""] = _NO_VALUE
        tables.append(encode_column(column, values).reshape(-1))
    offsets = np.array([0, *accumulate(len(table) for table in tables)][:-1], dtype=np.int64)
    return np.concatenate(tables) if tables else np.empty(0, dtype=np.int64), offsets


def _empty_like(block: Block, num_rows: int) -> Block:
    def empty(values: NDArray[np.generic]) -> NDArray[np.generic]:
        return np.empty((num_rows, *values.shape[1:]), dtype=values.dtype)

    return Block(
        np.empty((num_rows, block.numbers.shape[1]), dtype=np.float32),
        np.empty((num_rows, block.codes.shape[1]), dtype=np.int32),
        tuple(empty(values) for values in block.tensors),
        empty(block.target),
        None if block.weight is None else empty(block.weight),
    )
