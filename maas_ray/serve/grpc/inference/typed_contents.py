"""Typed contents: tensors as lists of numbers or strings in a message, which protobuf parses and writes."""

from collections.abc import Sequence
from itertools import islice
from math import prod
from typing import Any, cast

import numpy as np

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Datatype, TensorSpec
from maas_ray.bundle.strings import decode, encode
from maas_ray.errors import BadRequest
from maas_ray.serve.wire.answer_size import PIECE, Pause, pieces
from maas_ray.serve.wire.tensors import short

_CONTENTS: dict[Datatype, str] = {
    "BOOL": "bool_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
    "BYTES": "bytes_contents",
}
"""Field of `InferTensorContents` by datatype; FP16 and BF16 have none and are sent raw."""


def read_typed(spec: TensorSpec, shape: tuple[int, ...], contents: Any) -> Array:
    """Returns the tensor in an `InferTensorContents`.

    Raises:
        BadRequest: another field, number of elements, or range than its datatype and shape need.
    """
    field = _CONTENTS.get(spec.datatype)
    if field is None:
        raise BadRequest(f"input {spec.name!r}: {spec.datatype} has no typed contents; send raw_input_contents")
    if others := [other.name for other, _ in contents.ListFields() if other.name != field]:
        raise BadRequest(f"input {spec.name!r} is {spec.datatype}: send {field} instead of {', '.join(others)}")
    values = getattr(contents, field)
    if len(values) != prod(shape):
        raise BadRequest(
            f"input {spec.name!r}: {field} has {len(values)} elements, shape {list(shape)} needs {short(prod(shape))}"
        )
    if spec.datatype == "BYTES":
        return _strings(values).reshape(shape)
    dtype = NUMPY[spec.datatype]
    if field not in ("int_contents", "uint_contents"):
        return cast(Array, _from_iterable(values, dtype).reshape(shape))
    numbers = _from_iterable(values, np.dtype(np.int64))
    bounds = np.iinfo(dtype)  # type: ignore[type-var]
    fits = (numbers >= bounds.min) & (numbers <= bounds.max)
    if not fits.all():
        index = int(np.argmin(fits))
        raise BadRequest(f"input {spec.name!r}: element {index} is {numbers[index]}, out of range for {spec.datatype}")
    return cast(Array, numbers.astype(dtype).reshape(shape))


def _from_iterable(values: Sequence[Any], dtype: Any) -> Any:
    """Converts in pieces, so that a thread does not hold the interpreter for long."""
    count, rest = len(values), iter(values)
    sizes = [min(PIECE, count - start) for start in range(0, count, PIECE)]
    parts = [np.fromiter(islice(rest, size), dtype, size) for size in sizes]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype)


def _strings(values: Sequence[bytes]) -> Array:
    array = np.empty(len(values), dtype=object)
    array[:] = [decode(value) for value in values]
    return array


def write_typed(contents: Any, datatype: Datatype, array: Array, pause: Pause) -> None:
    """Writes a tensor to an `InferTensorContents`; `pause` is called between two pieces of work."""
    field = getattr(contents, _CONTENTS[datatype])
    for piece in pieces(array):
        values = piece.tolist()
        field.extend([encode(value) for value in values] if datatype == "BYTES" else values)
        pause()
