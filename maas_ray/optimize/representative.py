"""Rows for a bundle's first runs, made from what cleaning has learned. Sees no data, so that no bundle holds a real row.

A row of the training data would be as good for the warm-up, but whoever may read a bundle could read it. These values
say no more than the graph does, which holds the same statistics and categories. They depend on the features alone: the
same run gives the same bytes.
"""

from math import prod
from typing import Any

import numpy as np

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.bundle.sample import checked, write_sample
from maas_ray.data.spec.features import Column, Features, NumericColumn, TensorColumn

NUM_ROWS = 2
"""Rows that differ in each column, where it has two values."""
MAX_ELEMENTS = 1 << 14
"""Most elements of a row. Larger ones are images, of which zeros are taken as well, and JSON is not their format."""


def representative_sample(features: Features, signature: Signature) -> bytes | None:
    """Raw rows as callers send them, in the form in which bundles keep them.

    Args:
        features: what cleaning has learned.
        signature: of the graph that was exported; its inputs are the columns of `features`.

    Returns:
        See bundle/sample.py. None where a row has more than MAX_ELEMENTS elements.
    """
    if sum(prod(tensor.shape[1:]) for tensor in signature.inputs) > MAX_ELEMENTS:
        return None
    columns = zip(signature.inputs, features.columns, strict=True)
    values = {tensor.name: _rows(column, tensor) for tensor, column in columns}
    return write_sample(checked(values, signature), signature)


def _rows(column: Column, tensor: TensorSpec) -> Array:
    shape, dtype = (NUM_ROWS, *tensor.shape[1:]), NUMPY[tensor.datatype]
    rows: Array
    if column.kind == "categorical":
        first = column.fill or 0  # the most frequent one, where cleaning has looked for it
        codes = [(first + row) % len(column.categories) for row in range(NUM_ROWS)]
        rows = np.array([column.categories[code] for code in codes], dtype)
    elif column.kind == "tokens":
        rows = (np.arange(prod(shape)) % column.vocab_size).astype(dtype)
    else:
        rows = _numbers(column, prod(tensor.shape[1:]), dtype)
    return rows.reshape(shape)


def _numbers(column: NumericColumn | TensorColumn, num_elements: int, dtype: np.dtype[Any]) -> Array:
    """The center, then a spread beside it: of the whole column, or of each element of a tensor."""
    shift, scale = (np.atleast_1d(np.array(each, np.float64)) for each in (column.shift, column.scale))
    rows = np.stack([shift + row * scale for row in range(NUM_ROWS)])
    if dtype.kind == "u":
        rows = np.rint(rows).clip(0, np.iinfo(dtype).max)
    bound = float(np.finfo(np.float32).max)
    return np.broadcast_to(rows.clip(-bound, bound), (NUM_ROWS, num_elements)).astype(dtype)
