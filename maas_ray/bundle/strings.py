"""Runs graphs with string tensors whose bytes are not UTF-8, as `str` with surrogate escapes (PEP 383).

onnxruntime's Python interface converts strings to and from UTF-8 and fails on other bytes, although the graph itself
processes bytes. A run that failed for this reason is repeated here without this conversion: input strings are the
constant of a small graph, and output strings are read from the `std::string` objects in memory.
"""

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from math import prod

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.sessions import cpu_session
from maas_ray.errors import BadRequest

_RECORD_BYTES = 32
"""`std::string` of libstdc++: pointer, length, and 16 bytes that contain a short string themselves."""
_IR_VERSION, _OPSET = 8, 13


def decode(data: bytes | memoryview) -> str:
    """Decodes any bytes to an element of a tensor."""
    return str(data, "utf-8", "surrogateescape")


def encode(element: object) -> bytes:
    """Encodes an element as bytes."""
    return element.encode("utf-8", "surrogateescape") if isinstance(element, str) else bytes(element)  # type: ignore[call-overload]


def run(session: ort.InferenceSession, outputs: Sequence[str], inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Runs a graph once; input and output strings may contain any bytes.

    Raises:
        BadRequest: an output is not UTF-8 and this build of onnxruntime stores strings in an unknown layout.
    """
    feed = {
        name: _to_value(array)
        if array.dtype == object
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        for name, array in inputs.items()
    }
    values = session.run_with_ort_values(list(outputs), feed)
    return {
        name: _from_value(name, value) if value.data_type() == "tensor(string)" else np.array(value.numpy())
        for name, value in zip(outputs, values, strict=True)
    }


def _to_value(array: Array) -> ort.OrtValue:
    strings = [encode(element) for element in array.ravel().tolist()]
    constant = helper.make_tensor("strings", TensorProto.STRING, array.shape, strings)
    output = helper.make_tensor_value_info("out", TensorProto.STRING, array.shape)
    graph = helper.make_graph([helper.make_node("Identity", ["strings"], ["out"])], "g", [], [output], [constant])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION)
    return cpu_session(model.SerializeToString(), 1).run_with_ort_values(["out"], {})[0]


def _from_value(name: str, value: ort.OrtValue) -> Array:
    try:
        return np.array(value.numpy(), dtype=object).reshape(value.shape())
    except UnicodeDecodeError:
        pass
    if not _has_known_layout():
        raise BadRequest(
            f"output {name!r} contains strings that are not UTF-8, which this build of onnxruntime cannot return; "
            "request other outputs"
        )
    array = np.empty(prod(value.shape()), dtype=object)
    array[:] = [decode(data) for data in _read(value)]
    return array.reshape(value.shape())


def _read(value: ort.OrtValue) -> list[bytes]:
    records = (ctypes.c_uint64 * (_RECORD_BYTES // 8 * prod(value.shape()))).from_address(value.data_ptr())
    return [ctypes.string_at(records[at], records[at + 1]) for at in range(0, len(records), _RECORD_BYTES // 8)]


@cache
def _has_known_layout() -> bool:
    """Whether strings have the memory layout that `_read` expects: checked before any pointer is followed."""
    known = [b"short", b"\xff" * 100]
    value = _to_value(np.array([decode(text) for text in known], dtype=object))
    start = value.data_ptr()
    short = (ctypes.c_uint64 * 4).from_address(start)
    # A short string is stored after its own pointer and length.
    return short[0] == start + 16 and short[1] == len(known[0]) and _read(value) == known
