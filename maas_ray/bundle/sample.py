"""Reads and writes a bundle's sample: valid input values for its first runs, stored as JSON.

    {"version": 1, "inputs": [{"name": "x", "shape": [1, 3], "data": [0.5, 1.0, 2.0]}]}

The exporter or importer of the graph chooses the values; every caller of the model may read a bundle, so they must not
be personal data.
"""

import json
from math import prod
from typing import Any

import numpy as np

from maas_ray.bundle import bfloat16
from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BundleError, SpecError

MAX_BYTES = 8 << 20
"""Maximum size of a recorded sample; a few rows are enough."""
VERSION = 1


def write_sample(values: dict[str, Array], signature: Signature) -> bytes:
    """Serializes a sample; the same values give the same bytes.

    Args:
        values: every input of the signature, with its datatype and shape.
        signature: signature of the graph.
    """
    inputs = [
        {"name": t.name, "shape": list(values[t.name].shape), "data": _plain(values[t.name], t)}
        for t in signature.inputs
        if t.name in values
    ]
    return json.dumps({"version": VERSION, "inputs": inputs}, separators=(",", ":"), sort_keys=True).encode()


def read_sample(data: bytes, signature: Signature) -> dict[str, Array]:
    """Reads the sample of a graph.

    Raises:
        BundleError: it is not in the format of `write_sample` for this signature.
    """
    try:
        document = json.loads(data) if len(data) <= MAX_BYTES else None
        if not isinstance(document, dict) or document.get("version") != VERSION:
            raise SpecError("this version cannot read its format")
        return from_document(document, signature)
    except (ValueError, RecursionError, SpecError) as error:
        raise BundleError(f"cannot use the recorded sample: {error}; export the model again") from error


def from_document(document: dict[str, Any], signature: Signature) -> dict[str, Array]:
    """Reads values from a JSON request of the Open Inference Protocol v2.

    Raises:
        SpecError: they do not fit the signature; the message names the input.
    """
    specs = {tensor.name: tensor for tensor in signature.inputs}
    found: dict[str, Array] = {}
    entries = document.get("inputs")
    for entry in entries if isinstance(entries, list) else []:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or name not in specs:
            raise SpecError(f"the sample has the input {str(name)[:100]!r}; the model's inputs are {sorted(specs)}")
        try:
            found[name] = _array(specs[name], [int(size) for size in entry["shape"]], entry["data"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise SpecError(
                f"input {name!r} of the sample needs a shape and data of datatype {specs[name].datatype}: {error}"
            ) from error
    return checked(found, signature)


def checked(values: dict[str, Array], signature: Signature) -> dict[str, Array]:
    """The values in the signature's order and datatypes.

    Raises:
        SpecError: an input is missing or its shape differs from the signature.
    """
    result: dict[str, Array] = {}
    num_rows: int | None = None
    for tensor in signature.inputs:
        array = values.get(tensor.name)
        if array is None and tensor.optional:
            continue
        if array is None:
            raise SpecError(f"the sample does not contain the input {tensor.name!r}; give every input of the model")
        sizes = list(array.shape)
        if len(sizes) != len(tensor.shape) or any(a not in (-1, b) for a, b in zip(tensor.shape, sizes, strict=True)):
            raise SpecError(f"input {tensor.name!r} of the sample has the shape {sizes}; expected {list(tensor.shape)}")
        if signature.is_batched and not tensor.optional:
            if num_rows not in (None, sizes[0]) or not sizes[0]:
                raise SpecError(f"input {tensor.name!r} of the sample has {sizes[0]} rows, others {num_rows}")
            num_rows = sizes[0]
        wanted = NUMPY[tensor.datatype]
        if array.dtype != wanted:
            raise SpecError(f"input {tensor.name!r} of the sample is {array.dtype}; expected {tensor.datatype}")
        result[tensor.name] = array
    return result


def _plain(array: Array, tensor: TensorSpec) -> list[Any]:
    if tensor.datatype == "BF16":
        return list(bfloat16.to_float32(array).ravel().tolist())  # type: ignore[arg-type]
    return list(array.ravel().tolist())


def _array(tensor: TensorSpec, shape: list[int], data: Any) -> Array:
    count = prod(shape)
    if tensor.datatype == "BYTES":
        flat = np.array(data, dtype=object).ravel()
        if not all(isinstance(element, str) for element in flat):
            raise ValueError("an element is not a string")
        return flat.reshape(shape)
    if tensor.datatype == "BF16":
        return bfloat16.from_float32(np.array(data, np.float32).reshape(shape))
    numbers = np.array(data)
    if numbers.size != count:
        raise ValueError(f"{numbers.size} values for the shape {shape}")
    if numbers.dtype.kind not in "biuf":
        raise ValueError("an element is not a number")
    return numbers.astype(NUMPY[tensor.datatype]).reshape(shape)
