"""The table of datatypes of the Open Inference Protocol v2, NumPy and ONNX."""

import numpy as np
import numpy.typing as npt

from maas_ray.bundle.format import Datatype

Array = npt.NDArray[np.generic] | npt.NDArray[np.object_]
"""A tensor in memory; BYTES are object arrays of `str`, in which bytes other than UTF-8 are surrogate escapes."""

NUMPY: dict[Datatype, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype(np.uint8),
    "UINT16": np.dtype(np.uint16),
    "UINT32": np.dtype(np.uint32),
    "UINT64": np.dtype(np.uint64),
    "INT8": np.dtype(np.int8),
    "INT16": np.dtype(np.int16),
    "INT32": np.dtype(np.int32),
    "INT64": np.dtype(np.int64),
    "FP16": np.dtype(np.float16),
    "BF16": np.dtype(np.uint16),
    "FP32": np.dtype(np.float32),
    "FP64": np.dtype(np.float64),
    "BYTES": np.dtype(object),
}
"""NumPy types; BF16, which NumPy does not support, is represented by its bits."""

ONNX: dict[int, Datatype] = {
    1: "FP32", 2: "UINT8", 3: "INT8", 4: "UINT16", 5: "INT16", 6: "INT32", 7: "INT64", 8: "BYTES", 9: "BOOL",
    10: "FP16", 11: "FP64", 12: "UINT32", 13: "UINT64", 16: "BF16",
}  # fmt: skip
"""By `TensorProto.DataType` (onnx.proto3)."""
