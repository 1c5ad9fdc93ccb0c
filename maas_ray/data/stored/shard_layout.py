"""How a large table lies in a data set. Reads nothing."""

from maas_ray.spec import Spec


class Shard(Spec):
    """One part with a stretch of a split's rows."""

    name: str
    """Of the part."""
    num_rows: int


class ShardLayout(Spec):
    """The index of all shards; see `shard.py` for what is in one."""

    shards: dict[str, tuple[Shard, ...]]
    """By split, in the order of the rows."""
    dictionaries: dict[str, tuple[str, ...] | tuple[int, ...]]
    """By categorical column: the raw values of its codes. First those of the training split, sorted; "" is missing."""
