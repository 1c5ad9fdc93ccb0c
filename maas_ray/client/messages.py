"""Writes requests and reads responses of the Open Inference Protocol v2 for clients. Opens no connection.

Tensors are sent as bytes (the binary tensor extension, docs/protocol/extension_binary_data.md of
triton-inference-server/server), at a fraction of the server's cost for JSON.
"""

import json
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from maas_ray.client.description import ModelDescription, Tensor
from maas_ray.client.prediction import Prediction
from maas_ray.errors import (
    BadRequest,
    BodyTooLarge,
    ClusterError,
    DeadlineExceeded,
    MaasError,
    NotFound,
    NotThroughFront,
    Overloaded,
    RequestError,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

HEADER_LENGTH = "Inference-Header-Content-Length"
MAX_MESSAGE = 1000
"""Largest number of characters of a server's message in an error."""
_NUMPY = {
    "BOOL": "?", "UINT8": "u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_BY_STATUS: dict[int, type[MaasError]] = {
    400: BadRequest,
    403: NotThroughFront,
    404: NotFound,
    413: BodyTooLarge,
    503: Overloaded,
    504: DeadlineExceeded,
}


def write_request(inputs: Sequence[Tensor], data: Any) -> tuple[bytes, dict[str, str]]:
    """Returns the body and headers of an inference request.

    Args:
        inputs: inputs of the model.
        data: rows as a list of mappings (None is a missing value); arrays [rows, …] by input name; a pandas
            DataFrame with a column per input; or one array for a model with one input. An input that takes image files
            or texts takes `bytes` or `str` as well.

    Raises:
        BadRequest: a column is missing, or its values do not match the input's datatype and shape.
    """
    arrays = to_arrays(inputs, data)
    sizes = {len(array) for _, array in arrays}
    if len(sizes) != 1:
        found = ", ".join(f"{tensor.name} {len(array)}" for tensor, (_, array) in zip(inputs, arrays, strict=True))
        raise BadRequest(f"the inputs have different numbers of rows: {found}")
    if not sizes.pop():
        raise BadRequest("the data has no rows; give at least one")
    parts, described = [], []
    for tensor, (datatype, array) in zip(inputs, arrays, strict=True):
        content = _bytes(datatype, array)
        parameters = {"binary_data_size": len(content)}
        described.append(
            {"name": tensor.name, "datatype": datatype, "shape": list(array.shape), "parameters": parameters}
        )
        parts.append(content)
    head = json.dumps({"inputs": described, "parameters": {"binary_data_output": True}}).encode()
    return b"".join([head, *parts]), {"Content-Type": "application/octet-stream", HEADER_LENGTH: str(len(head))}


def read_response(headers: Mapping[str, str], body: bytes, model: ModelDescription | None = None) -> Prediction:
    """Reads the prediction of a model from a response with status 200.

    Raises:
        ClusterError: the response does not follow the protocol.
    """
    import numpy as np

    known = {name.lower(): value for name, value in headers.items()}
    length = int(known.get(HEADER_LENGTH.lower(), len(body)))
    try:
        document = json.loads(body[:length])
        outputs: dict[str, NDArray[Any]] = {}
        offset = length
        for one in document["outputs"]:
            size = one.get("parameters", {}).get("binary_data_size")
            if size is None:
                values = np.array(one["data"], object if one["datatype"] == "BYTES" else _NUMPY[one["datatype"]])
            else:
                values = _array(one["datatype"], body[offset : offset + size])
                offset += size
            outputs[one["name"]] = values.reshape(one["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ClusterError(f"the response does not follow the Open Inference Protocol v2: {error!r}") from error
    return Prediction(
        outputs,
        document.get("model_name", ""),
        str(document.get("model_version", "")),
        known.get("x-maas-run", ""),
        str(document.get("id") or known.get("x-request-id", "")),
        model.labels if model is not None else (),
    )


def read_error(url: str, status: int, headers: Mapping[str, str], body: bytes) -> MaasError:
    """Returns the error of a response with another status; the status determines its class."""
    try:
        message = str(json.loads(body)["error"])
    except (ValueError, KeyError, TypeError):
        message = body[:MAX_MESSAGE].decode(errors="replace").strip() or "no message"
    text = f"{url} answered {status}: {message[:MAX_MESSAGE]}"
    kind = _BY_STATUS.get(status, RequestError)
    if kind is Overloaded:
        return Overloaded(text, retry_after_s(headers) or 1.0)
    return kind(text)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds of the header `Retry-After`; None if it is missing or is no number."""
    for name, value in headers.items():
        if name.lower() == "retry-after":
            try:
                return max(0.0, float(value))
            except ValueError:
                return None  # a date, which our servers never send
    return None


def to_arrays(inputs: Sequence[Tensor], data: Any) -> "list[tuple[str, NDArray[Any]]]":
    """Returns the datatype and the array [rows, …] of each input, as it is sent; arguments are those of `write_request`.

    Raises:
        BadRequest: as `write_request`.
    """
    import numpy as np

    if isinstance(data, np.ndarray):
        if len(inputs) != 1:
            names = ", ".join(tensor.name for tensor in inputs)
            raise BadRequest(f"one array needs a model with one input; this model has {len(inputs)}: {names}")
        return [_shaped(inputs[0], data)]
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        rows: Sequence[Any] = data
        if not all(isinstance(row, Mapping) for row in rows):
            raise BadRequest(f"rows must be mappings from input to value; the model's inputs are {_names(inputs)}")
        _refuse_missing(inputs, set(rows[0]) if rows else {tensor.name for tensor in inputs})
        return [_shaped(tensor, [_value(tensor, row, number) for number, row in enumerate(rows)]) for tensor in inputs]
    if isinstance(data, Mapping) or hasattr(data, "columns"):
        _refuse_missing(inputs, set(data.keys()))
        return [_shaped(tensor, data[tensor.name]) for tensor in inputs]
    raise BadRequest(
        f"cannot read rows from {type(data).__name__}: give a list of mappings, arrays by input name, a DataFrame or, "
        "for a model with one input, an array"
    )


def _value(tensor: Tensor, row: Mapping[str, Any], number: int) -> Any:
    if tensor.name not in row:
        raise BadRequest(f"row {number} lacks {tensor.name}, required by the model")
    value = row[tensor.name]
    if value is not None:
        return value
    if tensor.datatype == "BYTES":
        return "" if tensor.is_scalar else [""] * prod(tensor.shape)
    if tensor.null_value is not None:
        return tensor.null_value
    if tensor.datatype.startswith("FP") or "FP32" in tensor.accepts:
        return [float("nan")] * prod(tensor.shape) if not tensor.is_scalar else float("nan")
    raise BadRequest(
        f"row {number}: {tensor.name} is None; an input of datatype {tensor.datatype} has no missing value"
    )


def _refuse_missing(inputs: Sequence[Tensor], names: set[Any]) -> None:
    if missing := [tensor.name for tensor in inputs if tensor.name not in names]:
        found = ", ".join(sorted(map(str, names))[:20]) or "none"
        raise BadRequest(f"the rows lack {', '.join(missing)}, required by the model; columns found: {found}")


def _names(inputs: Sequence[Tensor]) -> str:
    return ", ".join(f"{tensor.name} ({tensor.datatype})" for tensor in inputs)


def _shaped(tensor: Tensor, values: Any) -> "tuple[str, NDArray[Any]]":
    """Converts values of one input to [rows, *shape], without rounding, truncation or overflow."""
    import numpy as np

    datatype = tensor.datatype
    try:
        is_text = datatype == "BYTES" or (tensor.encoding != "" and _is_text(values))
        # NumPy's own arrays of bytes end at the last byte that is not zero.
        found = np.array(values, dtype=object) if is_text and isinstance(values, list) else np.asarray(values)
        if tensor.encoding and (found.dtype.kind in "US" or (found.dtype == object and _is_text(found.ravel()))):
            return "BYTES", found.astype(object).reshape(len(found))
        if tensor.accepts or tensor.null_value is not None or (datatype == "BYTES" and found.dtype == object):
            found = _without_missing(tensor, found)
        if datatype == "BOOL" and "FP32" in tensor.accepts and found.dtype.kind == "f":
            datatype = "FP32"
        wanted = "O" if datatype == "BYTES" else _NUMPY.get(datatype)
        if wanted is None:
            raise BadRequest(f"this client does not support datatype {datatype} of input {tensor.name}")
        if wanted != "O" and found.dtype.kind in "USM":
            raise ValueError(f"{found.dtype.name} is not a number")
        with np.errstate(invalid="ignore", over="ignore"):  # invalid values are found below
            array = found.astype(wanted, copy=False)
        if np.dtype(wanted).kind in "iub" and not np.array_equal(found, array):
            raise ValueError("a value has a fraction, is missing or is out of range")
        if -1 not in tensor.shape:
            array = array.reshape(len(array), *tensor.shape)
    except (ValueError, TypeError, OverflowError) as error:
        shape = ", ".join(["rows", *map(str, tensor.shape)])
        raise BadRequest(f"values of {tensor.name} do not match {datatype} [{shape}]: {error}") from error
    return datatype, array


def _is_text(values: Any) -> bool:
    """Whether all of at least one value are texts or files."""
    return len(values) > 0 and all(isinstance(value, str | bytes) for value in values)


def _without_missing(tensor: Tensor, found: "NDArray[Any]") -> "NDArray[Any]":
    """Replaces None, NaN and pandas' NA by the input's own missing value: NaN, an empty text or an integer."""
    import numpy as np

    if found.dtype.kind == "f":
        missing = np.isnan(found)
    elif found.dtype == object:  # a missing value is the only one that differs from itself, or cannot be compared
        missing = np.array([value is None or _is_odd(value) for value in found.ravel()], bool).reshape(found.shape)
    else:
        return found
    if tensor.datatype == "BYTES":
        return np.where(missing, "", found) if missing.any() else found
    if tensor.null_value is not None:
        return np.where(missing, tensor.null_value, found) if missing.any() else found
    if missing.any() or found.dtype == object:
        filled = np.where(missing, np.nan, found).astype(np.float64)
        return filled if missing.any() else filled.astype(bool) if set(np.unique(filled)) <= {0.0, 1.0} else filled
    return found.astype(bool) if bool(np.isin(found, (0.0, 1.0)).all()) else found


def _is_odd(value: Any) -> bool:
    try:
        return bool(value != value)
    except TypeError:  # pandas' NA
        return True


def _bytes(datatype: str, array: "NDArray[Any]") -> bytes:
    if datatype != "BYTES":
        return array.tobytes()
    elements = [value if isinstance(value, bytes) else str(value).encode() for value in array.ravel().tolist()]
    return b"".join(len(element).to_bytes(4, "little") + element for element in elements)


def _array(datatype: str, content: bytes) -> "NDArray[Any]":
    import numpy as np

    if datatype != "BYTES":
        return np.frombuffer(content, _NUMPY[datatype])
    found, offset = [], 0
    while offset < len(content):
        size = int.from_bytes(content[offset : offset + 4], "little")
        found.append(content[offset + 4 : offset + 4 + size].decode(errors="surrogateescape"))
        offset += 4 + size
    return np.array(found, object)
