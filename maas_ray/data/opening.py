"""The rows of a split as a loader takes them, whatever the data set holds. Knows no model and no process group."""

from maas_ray.data.dataset import Dataset
from maas_ray.data.encode import encode_columns
from maas_ray.data.rows import Rows, Table


def open_rows(dataset: Dataset, split: str, *, seed: int = 0) -> Rows:
    """Opens one split: a table is read into memory.

    Args:
        dataset: a prepared data set.
        split: `train`, `validation` or `test`.
        seed: of what is random about a row (the masks of masked language modeling).

    Raises:
        DataError: there is no such split, or it has no rows.
        ObjectCorrupt: a part is missing, truncated or altered.
    """
    rows = dataset.read(split)
    return Table(encode_columns(dataset.features, rows.columns), rows.target)
