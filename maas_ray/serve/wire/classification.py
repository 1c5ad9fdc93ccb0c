"""Classification extension: the best classes of each row as strings "value:index[:label]".

Source: triton-inference-server/server, docs/protocol/extension_classification.md; the format of the value (six decimals
for floats, as C++ `std::to_string`), the shape and the order are those of src/classification.cc and http_server.cc.
"""

from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import numpy.typing as npt

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Datatype

REFUSED = frozenset({"BOOL", "BYTES", "BF16"})
"""Datatypes without a meaningful order; Triton refuses FP16 as well, which numpy can compare."""


def classify(
    scores: Array,
    num_classes: int,
    labels: Sequence[str] | None,
    *,
    is_batched: bool,
    pause: Callable[[], None] | None = None,
) -> Array:
    """Returns the highest scores of each row, best first; of equal ones the lower index first, NaN last.

    Args:
        scores: an output of the model.
        num_classes: maximum number of classes; fewer if the output has fewer.
        labels: names by index; omitted unless there is one for every score of a row.
        is_batched: whether the first dimension counts rows; otherwise the whole output is one row.
        pause: called after each row; may raise.

    Returns:
        Objects of `str`, of shape [rows, classes], or [classes] without a batch dimension.
    """
    num_rows = scores.shape[0] if is_batched else 1
    width = prod(scores.shape[1:] if is_batched else scores.shape)
    kept = min(num_classes, width)
    names = labels if labels is not None and len(labels) == width else None
    found = np.empty((num_rows, kept), dtype=object)
    if kept:
        for row, values in enumerate(scores.reshape(num_rows, width)):
            found[row] = [_describe(values[index], index, names) for index in _best(values, kept).tolist()]
            if pause is not None:
                pause()
    return found if is_batched else found.reshape(kept)


def can_classify(datatype: Datatype) -> bool:
    """Whether the values of a datatype can be ordered."""
    return datatype not in REFUSED


def _best(values: Array, kept: int) -> npt.NDArray[np.intp]:
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), -np.inf, values)
    limit = np.partition(values, -kept)[-kept]  # linear time; sorting a large output would take long
    above = np.nonzero(values > limit)[0]
    equal = np.nonzero(values == limit)[0][: kept - len(above)]  # there may be as many as there are values
    candidates = np.sort(np.concatenate([above, equal]))
    # Ascending and stable from the back, read from the back: of equal values the lower index comes first.
    return candidates[::-1][np.argsort(values[candidates[::-1]], kind="stable")][::-1]


def _describe(value: np.generic, index: int, names: Sequence[str] | None) -> str:
    shown = f"{float(value):.6f}" if value.dtype.kind == "f" else str(value)
    return f"{shown}:{index}:{names[index]}" if names is not None else f"{shown}:{index}"
