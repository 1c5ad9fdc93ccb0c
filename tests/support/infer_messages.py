"""Serialized requests of the v2 protocol over gRPC."""

from typing import Any

import numpy as np

from maas_ray.bundle.datatypes import Array
from maas_ray.serve.grpc import inference_pb2 as pb

Value = pb.InferParameter
Contents = pb.InferTensorContents
FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip


def raw_of(array: Array) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in array.ravel())


def message(datatype: str, array: Array, *, is_raw: bool, **more: Any) -> Any:
    request = pb.ModelInferRequest(model_name="m", **more)
    tensor = request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    if is_raw:
        request.raw_input_contents.append(raw_of(array))
    else:
        values = array.ravel().tolist()
        field = getattr(tensor.contents, FIELDS[datatype])
        field.extend([value.encode() for value in values] if datatype == "BYTES" else values)
    return request


def changed(**what: Any) -> Any:
    """A good request of one FP32 row, with one thing changed."""
    request = message("FP32", np.ones((1, 3), np.float32), is_raw=what.pop("is_raw", True))
    tensor = request.inputs[0]
    for name, value in what.items():
        match name:
            case "shape":
                tensor.ClearField("shape")
                tensor.shape.extend(value)
            case "raw":
                request.ClearField("raw_input_contents")
                request.raw_input_contents.extend(value)
            case "contents":
                tensor.contents.MergeFrom(value)
            case "outputs":
                request.outputs.extend([pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in value])
            case "parameters":
                for key, parameter in value.items():
                    request.parameters[key].MergeFrom(parameter)
            case "tensor_parameters":
                for key, parameter in value.items():
                    tensor.parameters[key].MergeFrom(parameter)
            case "id":
                request.id = value
            case _:
                setattr(tensor, name, value)
    return request
