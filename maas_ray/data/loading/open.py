"""Opens the rows of a split for a loader, for every kind of data set. Independent of models and process groups."""

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.loading.mapped_rows import ShardRows
from maas_ray.data.loading.mmap_cache import map_part
from maas_ray.data.loading.rows import Rows, Table
from maas_ray.data.loading.target_units import scaled_target
from maas_ray.data.loading.token_windows import Windows
from maas_ray.data.stored.dataset import Dataset
from maas_ray.data.stored.token_layout import DATATYPES


def open_rows(dataset: Dataset, split: str, *, seed: int = 0) -> Rows:
    """Opens one split, with the target as the network learns it: a small table is read into memory, a large one or a token stream is memory-mapped.

    Every byte is verified before it is used.

    Args:
        dataset: a prepared data set.
        split: `train`, `validation` or `test`.
        seed: seed of everything random about a row (the masks of masked language modeling).

    Raises:
        DataError: there is no such split, or it has no rows.
        ObjectCorrupt: a part is missing, truncated or altered.
    """
    dataset.require_rows(split)
    if dataset.shards is not None:
        return ShardRows(dataset.committed, dataset.shards, dataset.features, split)
    if dataset.tokens is None or dataset.features.tokens is None:
        rows = dataset.read(split)
        target = scaled_target(dataset.features.target_scaling, rows.target)
        return Table(encode_columns(dataset.features, rows.columns), target, rows.weight)
    names = sorted(name for name in dataset.committed.parts if name.startswith(f"{split}/"))
    parts = [map_part(dataset.committed, name, DATATYPES[dataset.tokens.datatype]) for name in names]
    return Windows(parts, dataset.tokens, split, dataset.features.tokens.vocab_size, seed)
