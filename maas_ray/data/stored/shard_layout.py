"""The index of a large table's shards in a data set."""

from maas_ray.spec import Spec


class Shard(Spec):
    """One part with consecutive rows of a split."""

    name: str
    """Name of the part."""
    num_rows: int


class ShardLayout(Spec):
    """The index of all shards; see `shard.py` for the content of a shard."""

    shards: dict[str, tuple[Shard, ...]]
    """By split, in the order of the rows."""
    dictionaries: dict[str, tuple[str, ...] | tuple[int, ...]]
    """By categorical column: the raw values of its codes, those of the training split first, sorted; "" is missing."""
