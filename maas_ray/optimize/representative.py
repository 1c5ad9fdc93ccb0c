"""Generates rows for a bundle's first runs from the fitted features, so that no bundle contains real data.

A row of the training data would be as suitable for the warm-up, but all readers of a bundle could read it. These values
reveal no more than the graph, which contains the same statistics and categories. They depend on the features alone: the
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
"""Number of rows; they differ in each column that has two values."""
MAX_ELEMENTS = 1 << 14
"""Maximum elements of a row. Larger rows are images, which also accept zeros and would be inefficient in JSON."""


def representative_sample(features: Features, signature: Signature) -> bytes | None:
    """Raw rows as callers send them, in the bundle's sample format.

    Args:
        features: the fitted features.
        signature: signature of the exported graph; its inputs are the columns of `features`.

    Returns:
        See bundle/sample.py. None if a row has more than MAX_ELEMENTS elements.
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
        first = column.fill or 0  # the most frequent category, if the cleaning policy computes it
        codes = [(first + row) % len(column.categories) for row in range(NUM_ROWS)]
        rows = np.array([column.categories[code] for code in codes], dtype)
    elif column.kind == "date":
        rows = column.origin + 86400.0 * np.arange(NUM_ROWS)
    elif column.kind == "tokens":
        rows = (np.arange(prod(shape)) % column.vocab_size).astype(dtype)
    else:
        rows = _numbers(column, prod(tensor.shape[1:]), dtype)
    return rows.reshape(shape)


def _numbers(column: NumericColumn | TensorColumn, num_elements: int, dtype: np.dtype[Any]) -> Array:
    """The center, then the center plus the scale: of the whole column, or of each element of a tensor."""
    shift, scale = (np.atleast_1d(np.array(each, np.float64)) for each in (column.shift, column.scale))
    rows = np.stack([shift + row * scale for row in range(NUM_ROWS)])
    if column.kind == "numeric" and column.offset is not None:
        rows = rows + column.offset
    if dtype.kind == "u":
        rows = np.rint(rows).clip(0, np.iinfo(dtype).max)
    bound = float(np.finfo(np.float32).max)
    return np.broadcast_to(rows.clip(-bound, bound), (NUM_ROWS, num_elements)).astype(dtype)
