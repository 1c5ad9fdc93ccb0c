"""Values for a version's first runs: recorded values, else synthetic values that many graphs accept. Runs nothing.

A graph may reject any synthetic values (an index outside its table, a size that it cannot resize to), so a rejection is
not an error of the graph.
"""

from collections.abc import Callable, Iterator
from math import prod
from typing import NamedTuple

import numpy as np

from maas_ray.bundle import bfloat16
from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Signature, TensorSpec

FREE_SIZES = (1, 8, 32, 224)
"""Tried for free sizes other than the number of rows; an image model rejects an image of one pixel."""
MAX_ELEMENTS = 4 << 20
"""Maximum elements of a synthetic input."""

Values = dict[str, Array]


class Guess(NamedTuple):
    """One kind of input values."""

    name: str
    """Name of the kind, for messages."""
    values: Callable[[int], Values]
    """Returns the inputs of a run with the given number of rows."""


def guesses(signature: Signature) -> Iterator[Guess]:
    """Kinds of values to try in order, the most harmless first, until the graph accepts one."""
    is_batched = signature.is_batched
    is_free = any(-1 in (t.shape[1:] if is_batched else t.shape) for t in signature.required)
    for size in FREE_SIZES if is_free else (1,):
        if any(prod(_shape(tensor, 1, size, is_batched)) > MAX_ELEMENTS for tensor in signature.required):
            return
        for name, fill in _FILLS.items():
            suffix = f", free sizes {size}" if is_free else ""

            def make(num_rows: int, fill: _Fill = fill, size: int = size) -> Values:
                return {t.name: fill(t, _shape(t, num_rows, size, is_batched)) for t in signature.required}

            yield Guess(name + suffix, make)


def repeated(sample: Values, signature: Signature) -> Guess:
    """Recorded values; their rows are repeated for larger runs."""

    def make(num_rows: int) -> Values:
        if not signature.is_batched:
            return sample
        has_rows = {tensor.name for tensor in signature.required}
        return {
            name: np.resize(array, (num_rows, *array.shape[1:])) if name in has_rows else array
            for name, array in sample.items()
        }

    return Guess("recorded values", make)


_Fill = Callable[[TensorSpec, tuple[int, ...]], Array]


def _zeros(tensor: TensorSpec, shape: tuple[int, ...]) -> Array:
    if tensor.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    return np.zeros(shape, dtype=NUMPY[tensor.datatype])


def _ones(tensor: TensorSpec, shape: tuple[int, ...]) -> Array:
    if tensor.datatype == "BYTES":
        return np.full(shape, "1", dtype=object)  # also valid as a number
    if tensor.datatype == "BF16":
        return bfloat16.from_float32(np.ones(shape, np.float32))
    return np.ones(shape, dtype=NUMPY[tensor.datatype])


def _counting(tensor: TensorSpec, shape: tuple[int, ...]) -> Array:
    """1, 2, 3, …: distinct and within the range of every datatype."""
    numbers = (np.arange(prod(shape)) % 100 + 1).reshape(shape)
    if tensor.datatype == "BYTES":
        return numbers.astype(str).astype(object)
    if tensor.datatype == "BF16":
        return bfloat16.from_float32(numbers.astype(np.float32))
    return numbers.astype(NUMPY[tensor.datatype])


_FILLS: dict[str, _Fill] = {"zeros": _zeros, "ones": _ones, "counting numbers": _counting}


def _shape(tensor: TensorSpec, num_rows: int, size: int, is_batched: bool) -> tuple[int, ...]:
    return tuple(
        (num_rows if axis == 0 and is_batched else size) if given == -1 else given
        for axis, given in enumerate(tensor.shape)
    )
