"""Writes the shards of one unit to the store, inside its task. The same unit gives the same bytes every time."""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.large.clean import CleanBlock, CleaningJob, read_clean
from maas_ray.data.spec.data import SPLITS
from maas_ray.data.spec.features import CategoricalColumn, Features, is_wide
from maas_ray.data.stored.dataset import MAX_PART_BYTES, dataset_part_key
from maas_ray.data.stored.shard import Block, Dictionaries, join, pack, row_bytes
from maas_ray.data.table.target import encode_target
from maas_ray.errors import DataError
from maas_ray.store.objects import ObjectStore, StorageSpec, open_store


@dataclass(frozen=True)
class Writing:
    """The content and the location of the shards that a task writes."""

    job: CleaningJob
    features: Features
    dictionaries: Dictionaries
    digest: str
    """Digest of the data set."""
    attempt: str
    """See `CommitWriter`."""


def write_unit(number: int, writing: Writing, storage: StorageSpec) -> list[dict[str, Any]]:
    """Writes the shards of one unit; returns the manifest entry and the rows of each."""
    return write_shards(number, writing, open_store(storage))


def write_shards(number: int, writing: Writing, store: ObjectStore) -> list[dict[str, Any]]:
    """As `write_unit`, to an open store."""
    limit = max(1, MAX_PART_BYTES // row_bytes(writing.features))
    waiting: dict[str, list[Block]] = {split: [] for split in SPLITS}
    written: list[dict[str, Any]] = []

    def write(split: str, rows: Block) -> None:
        name = f"{split}/{number:06d}-{sum(one['split'] == split for one in written):03d}.shard"
        content = memoryview(pack(rows)).cast("B")
        key = dataset_part_key(writing.digest, writing.attempt, name)
        store.put(key, content)
        part = {"key": key, "size": len(content), "sha256": sha256(content).hexdigest()}
        written.append({"split": split, "name": name, "num_rows": len(rows), "part": part})

    for block in read_clean(writing.job, number):
        for split in SPLITS:
            rows = _encode(writing, block, split)
            if len(rows):
                waiting[split].append(rows)
            if sum(map(len, waiting[split])) >= limit:
                joined = join(waiting[split])
                whole = len(joined) // limit * limit
                for start in range(0, whole, limit):
                    write(split, joined.slice(start, start + limit))
                # Copies the remaining rows, so that the written rows are freed.
                rest = np.arange(whole, len(joined), dtype=np.int64)
                waiting[split] = [joined.take(rest)] if len(rest) else []
    for split in SPLITS:
        if waiting[split]:
            write(split, join(waiting[split]))
    return written


def _encode(writing: Writing, block: CleanBlock, split: str) -> Block:
    ids = block.rows(split)
    features = writing.features
    target = encode_target(features.target, block.target.values.take(ids), features.labels, split)
    target = target.astype(np.float32) if features.task == "binary" else target
    weight = block.weight.take(ids).to_numpy() if block.weight is not None else None
    return encode_rows(features, writing.dictionaries, block.table.take(ids), target, weight)


def encode_rows(
    features: Features,
    dictionaries: Dictionaries,
    table: pa.Table,
    target: NDArray[Any],
    weight: NDArray[Any] | None = None,
) -> Block:
    """Encodes cast columns as rows of a shard.

    Args:
        features: description of the columns.
        dictionaries: by categorical column, see `ShardLayout`.
        table: the cast columns.
        target: [N], encoded.
        weight: float32 [N], or None.
    """
    columns = features.columns
    numbers = [table.column(one.name).to_numpy() for one in columns if one.kind == "numeric" and not is_wide(one)]
    codes = [
        _codes(one, dictionaries[one.name], table.column(one.name))
        for one in columns
        if isinstance(one, CategoricalColumn)
    ]
    tensors = []
    for column in columns:
        if is_wide(column):
            tensors.append(table.column(column.name).to_numpy().reshape(-1, 1))
        elif column.kind == "tensor":
            flat = [chunk.flatten().to_numpy() for chunk in table.column(column.name).chunks]
            tensors.append(np.concatenate(flat).reshape(len(target), *column.shape))
    return Block(
        np.stack(numbers, axis=1) if numbers else np.empty((len(target), 0), dtype=np.float32),
        np.stack(codes, axis=1) if codes else np.empty((len(target), 0), dtype=np.int32),
        tuple(tensors),
        target,
        weight,
    )


def _codes(column: CategoricalColumn, dictionary: Sequence[Any], values: pa.ChunkedArray) -> NDArray[np.int32]:
    kind = pa.string() if column.datatype == "BYTES" else pa.int64()
    found = pc.index_in(values, value_set=pa.array(dictionary, kind))
    if found.null_count:  # the statistics were computed from other values
        raise DataError(
            f"column {column.name!r} changed while it was being read; prepare it again once its files are complete"
        )
    codes: NDArray[np.int32] = found.to_numpy().astype(np.int32)
    return codes
