"""Commits an in-memory table in shards, so that ranks map them instead of copying them."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.large.gather import Content
from maas_ray.data.large.write import encode_rows
from maas_ray.data.spec.data import SPLITS
from maas_ray.data.spec.features import CategoricalColumn, Features
from maas_ray.data.stored.dataset import (
    MAX_PART_BYTES,
    SHARDED,
    TARGET,
    WEIGHT,
    Dataset,
    begin_dataset,
    content_digest,
    count_classes,
    end_dataset,
    open_dataset,
)
from maas_ray.data.stored.shard import pack, row_bytes
from maas_ray.data.stored.shard_layout import Shard, ShardLayout
from maas_ray.errors import NotFound
from maas_ray.store.objects import ObjectStore


def save_shards(
    store: ObjectStore,
    tables: Mapping[str, pa.Table],
    features: Features,
    report: Mapping[str, Any],
    source: Mapping[str, Any],
    profile: Mapping[str, Any] | None = None,
) -> Dataset:
    """As `save_dataset`."""
    num_rows = {split: tables[split].num_rows for split in SPLITS}
    body = {
        "format": SHARDED,
        "features": features.model_dump(mode="json"),
        "num_rows": num_rows,
        "report": dict(report),
    }
    digest = content_digest(body, {split: _digest(tables[split]) for split in SPLITS})
    try:
        return open_dataset(store, digest)
    except NotFound:
        pass  # the first time
    held_out = {
        column.name: {
            value for split in SPLITS[1:] for value in pc.unique(tables[split].column(column.name)).to_pylist()
        }
        for column in features.columns
        if isinstance(column, CategoricalColumn)
    }
    dictionaries = build_dictionaries(features, held_out)
    writer = begin_dataset(store, digest)
    limit = max(1, MAX_PART_BYTES // row_bytes(features))
    shards: dict[str, tuple[Shard, ...]] = {}
    for split, table in tables.items():
        found = []
        for i, start in enumerate(range(0, table.num_rows, limit)):
            part = table.slice(start, limit)
            weight = part.column(WEIGHT).to_numpy() if features.weight is not None else None
            rows = encode_rows(features, dictionaries, part, part.column(TARGET).to_numpy(), weight)
            found.append(Shard(name=f"{split}/{i:06d}-000.shard", num_rows=len(rows)))
            writer.put(found[-1].name, pack(rows).to_pybytes())
        shards[split] = tuple(found)
    layout = ShardLayout(shards=shards, dictionaries=dictionaries)
    about = {
        "shards": layout.model_dump(mode="json"),
        "source": dict(source),
        **({"profile": dict(profile)} if profile is not None else {}),
        "class_rows": count_classes(features, tables["train"].column(TARGET).to_numpy()),
    }
    return end_dataset(store, writer, digest, {**body, **about})


def build_dictionaries(features: Features, held_out: Mapping[str, set[Any]]) -> dict[str, tuple[Any, ...]]:
    """Codes of every raw value: the training split's first, so that these equal the model's codes."""
    result = {}
    for column in features.columns:
        if isinstance(column, CategoricalColumn):
            seen = held_out[column.name] | ({""} if column.datatype == "BYTES" else set())
            result[column.name] = (*column.categories, *sorted(seen - set(column.categories)))
    return result


def _digest(table: pa.Table) -> str:
    content = Content()
    if table.num_rows:
        content.add(table.drop_columns([TARGET]), table.column(TARGET).combine_chunks())
    return content.hexdigest()
