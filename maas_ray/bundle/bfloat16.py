"""BF16 tensors, which NumPy does not support: represented as uint16 bits, and passed to onnxruntime as BF16.

Runs of graphs with BF16 inputs or outputs use `OrtValue`, which costs about 40 microseconds more than plain runs.
"""

import ctypes
from collections.abc import Mapping
from math import prod

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Signature

_ONNX = 16
"""`TensorProto.BFLOAT16`."""


def is_in(signature: Signature) -> bool:
    """Whether any input or output is BF16."""
    return any(tensor.datatype == "BF16" for tensor in (*signature.inputs, *signature.outputs))


def run(
    session: ort.InferenceSession,
    signature: Signature,
    inputs: Mapping[str, Array],
    options: ort.RunOptions | None = None,
) -> dict[str, Array]:
    """Runs a graph once; BF16 tensors are uint16 bits on both sides."""
    values = {
        tensor.name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(np.ascontiguousarray(inputs[tensor.name]), _ONNX)
        if tensor.datatype == "BF16"
        else ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(inputs[tensor.name]))
        for tensor in signature.inputs
        if tensor.name in inputs
    }
    names = [tensor.name for tensor in signature.outputs]
    results = session.run_with_ort_values(names, values, options)
    return {
        tensor.name: _bits(value) if tensor.datatype == "BF16" else np.array(value.numpy())
        for tensor, value in zip(signature.outputs, results, strict=True)
    }


def to_float32(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Converts bits to numbers: BF16 is the upper half of FP32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def from_float32(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Converts numbers to bits, rounded toward zero."""
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def widen(signature: Signature, outputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs with BF16 as FP32, to be compared as numbers."""
    kinds = {tensor.name: tensor.datatype for tensor in signature.outputs}
    return {name: to_float32(a) if kinds[name] == "BF16" else a for name, a in outputs.items()}  # type: ignore[arg-type]


def _bits(value: ort.OrtValue) -> npt.NDArray[np.uint16]:
    """A copy of the bits of a tensor in the host's memory."""
    shape = value.shape()
    if not prod(shape):
        return np.empty(shape, np.uint16)
    found = (ctypes.c_uint16 * prod(shape)).from_address(value.data_ptr())
    return np.frombuffer(found, np.uint16).reshape(shape).copy()
