"""Raw rows with scikit-learn's predictions, stored with the graph: the estimator itself is not kept after training.

proof.arrow     Arrow IPC: one column per feature, `scores` float64 and, for classes, `class` int64
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from maas_ray.arrays import Array
from maas_ray.data.sources.arrays import tensor_field, tensor_values
from maas_ray.data.stored.dataset import Dataset
from maas_ray.data.stored.random_rows import draw_rows
from maas_ray.errors import ObjectCorrupt

NUM_REAL = 256
"""Largest number of held-out rows in a proof."""
NUM_RANDOM = 128
"""Number of random rows in a proof; more if a column has many categories."""


@dataclass(frozen=True)
class Proof:
    """Rows and the predictions of the fitted estimator."""

    columns: list[Array]
    """Raw columns in the order of the features, as returned by `Dataset.read`."""
    num_real: int
    """Number of real rows, which are the first ones; the others are random."""
    scores: Array
    """float64 [N, K], see `Fitted.answer`."""
    classes: Array | None
    """int64 [N]; None for a regression."""


def choose_rows(dataset: Dataset) -> tuple[list[Array], int]:
    """Raw rows for a proof: held-out ones, if any, then random ones; and the number of real rows."""
    split = next(name for name in ("test", "validation", "train") if dataset.num_rows.get(name))
    real = dataset.spread(split, NUM_REAL)
    random = draw_rows(dataset.features, NUM_RANDOM, seed=0)
    return [np.concatenate(pair) for pair in zip(real, random, strict=True)], len(real[0])


def pack(proof: Proof) -> bytes:
    """Serializes a proof."""
    named = {f"column {i}": values for i, values in enumerate(proof.columns)} | {"scores": proof.scores}
    if proof.classes is not None:
        named["class"] = proof.classes.reshape(-1, 1)
    pairs = [_field(name, values) for name, values in named.items()]
    schema = pa.schema([field for field, _ in pairs], metadata={"num_real": str(proof.num_real)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table([array for _, array in pairs], schema=schema))
    content: bytes = sink.getvalue().to_pybytes()
    return content


def unpack(content: bytes) -> Proof:
    """Reads the output of `pack`. Raises `ObjectCorrupt` for anything else."""
    try:
        table = pa.ipc.open_file(content).read_all()
        arrays = {name: _values(table.schema.field(name), table.column(name)) for name in table.column_names}
        scores = arrays.pop("scores")
        classes = arrays.pop("class", None)
        num_real = int(table.schema.metadata[b"num_real"])
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
        raise ObjectCorrupt(f"the proof of a fitted model is malformed: {error}") from error
    return Proof(list(arrays.values()), num_real, scores, None if classes is None else classes.reshape(-1))


def _field(name: str, values: Array) -> tuple[pa.Field, pa.Array]:
    if values.dtype != object:
        return tensor_field(name, values)
    array = pa.array(values.reshape(-1).tolist(), pa.string())
    return pa.field(name, array.type), array


def _values(field: pa.Field, column: pa.ChunkedArray) -> Array:
    if pa.types.is_string(field.type):
        return np.array(column.to_pylist(), object).reshape(-1, 1)
    # Writable, because torch.from_numpy warns about read-only memory such as Arrow's.
    return np.require(tensor_values(field, column), requirements=["C", "W"])
