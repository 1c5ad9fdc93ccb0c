"""Reads an ONNX file and inlines its external data. Runs nothing, and follows no path outside the folder.

This process only copies bytes: the model is decoded in child processes with limits, because a few bytes of a message
may expand to very many in memory.

External data is a file name, an offset and a length inside the model (onnx.proto3, `TensorProto.external_data`): all
three are untrusted, so they are checked before a byte is read.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import onnx
from onnx import ModelProto, TensorProto

from maas_ray import confined
from maas_ray.bundle.datatypes import NUMPY, ONNX
from maas_ray.bundle.format import MAX_GRAPH_BYTES
from maas_ray.bundle.graph.checks import tensors_of
from maas_ray.errors import BundleError, ConfinedError, NotFound
from maas_ray.foreign.files import Unreadable, open_beside, open_file, open_folder

WALL_S = 120.0
BYTES_PER_S = 1 << 20
"""The time limit for decoding is `WALL_S` plus a second per this many bytes of the file."""
BASE_MEMORY_BYTES = 1 << 30
FILE_FACTOR = 8
"""The memory limit for decoding is a constant plus this multiple of the file's bytes."""
MAX_EXTERNAL = 50_000
"""Maximum number of tensors with external data."""
MAX_OUTLINE_BYTES = 1 << 26
_SPARE_BYTES = 1 << 16


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model as one piece."""

    graph: bytes
    """The serialized `ModelProto`, weights inline."""
    sha256: str
    """Hex digest of the file followed by the files of its external data in the order of their names."""
    producer: str
    """The program that wrote it, according to the file."""


@dataclass(frozen=True)
class _External:
    """The description of a tensor with external data."""

    name: str
    dims: tuple[int, ...]
    data_type: int
    entries: dict[str, str]


def read_onnx(path: Path) -> OnnxFile:
    """Reads a model with its external data.

    Args:
        path: the file; external data must be in the same folder, as plain files and not as links.

    Raises:
        NotFound: there is no such file.
        BundleError: the file is not an ONNX model, or its external data is not valid; the message names the tensor and
            the reason.
    """
    try:
        with open_folder(path.parent) as folder:
            return _read(path, folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error


def _read(path: Path, folder: int) -> OnnxFile:
    try:
        with open_file(path.name, MAX_GRAPH_BYTES, folder=folder) as opened:
            data = opened.read(0, opened.size)
    except Unreadable as error:
        raise BundleError(f"{path} {error}") from error
    outline = _call("outline", [data], MAX_OUTLINE_BYTES, str(path)).payload
    tensors = [_External(name, tuple(dims), kind, entries) for name, dims, kind, entries in outline["external"]]
    digest = sha256(data)
    if tensors:
        values = _read_beside(folder, tensors, MAX_GRAPH_BYTES - len(data), digest.update)
        size = len(data) + sum(map(len, values)) + _SPARE_BYTES
        data = bytes(_call("put_inside", [data, *values], size, str(path)).blobs[0])
    return OnnxFile(data, digest.hexdigest(), outline["producer"])


def _call(function: str, blobs: Sequence[bytes], answer_bytes: int, what: str) -> confined.Result:
    size = sum(map(len, blobs))
    wall_s = WALL_S + size / BYTES_PER_S
    memory_bytes = BASE_MEMORY_BYTES + FILE_FACTOR * size
    limits = confined.Limits(wall_s=wall_s, cpu_s=wall_s, memory_bytes=memory_bytes, answer_bytes=answer_bytes)
    try:
        return confined.call(f"{__name__}:{function}", {"what": what}, blobs, limits, what=f"decoding {what}")
    except ConfinedError as error:
        raise BundleError(f"cannot decode {what} as an ONNX model: {error}") from error


def _read_beside(folder: int, tensors: Sequence[_External], left: int, seen: Callable[[bytes], object]) -> list[bytes]:
    """Reads the data of tensors, in order, from external files; at most `left` bytes."""
    by_file: dict[str, list[int]] = {}
    for place, tensor in enumerate(tensors):
        by_file.setdefault(_location(tensor), []).append(place)
    values = [b""] * len(tensors)
    for name, places in sorted(by_file.items()):
        read, left = _read_file(folder, name, [tensors[place] for place in places], left, seen)
        for place, value in zip(places, read, strict=True):
            values[place] = value
    return values


def _read_file(
    folder: int, name: str, tensors: list[_External], left: int, seen: Callable[[bytes], object]
) -> tuple[list[bytes], int]:
    """Reads the data of tensors from an external file; returns it, and the remaining byte limit.

    `seen` receives every byte of the file.
    """
    where = f"the file {name!r} with the data of tensor {tensors[0].name!r}"
    values = []
    try:
        with open_beside(folder, name, MAX_GRAPH_BYTES) as opened:
            for tensor in tensors:
                start, stop = _part(tensor, opened.size)
                left -= stop - start
                if left < 0:
                    raise Unreadable(
                        f"makes the model larger than {MAX_GRAPH_BYTES} bytes, the limit for a message of protocol "
                        "buffers; export the model in half precision or in parts"
                    )
                values.append(opened.read(start, stop))
            for chunk in opened.chunks():
                seen(chunk)
    except FileNotFoundError as error:
        raise BundleError(f"{where} does not exist; it must be in the folder of the model") from error
    except Unreadable as error:
        raise BundleError(f"{where} {error}") from error
    return values, left


def _location(tensor: _External) -> str:
    name = tensor.entries.get("location", "")
    if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
        raise BundleError(
            f"tensor {tensor.name!r} has its data at {name[:120]!r}; only plain file names in the model's own folder "
            "are read; save the model again with all its data in one file next to it"
        )
    return name


def _part(tensor: _External, size: int) -> tuple[int, int]:
    """First and last byte of a tensor's data in a file of `size` bytes."""
    offset, length = _number(tensor, "offset") or 0, _number(tensor, "length")
    if any(size < 0 for size in tensor.dims):
        raise BundleError(f"tensor {tensor.name!r} has the impossible shape {list(tensor.dims)}")
    kind = ONNX.get(tensor.data_type)
    if kind == "BYTES":
        raise BundleError(f"tensor {tensor.name!r} contains strings, which cannot be external data")
    if kind is not None:
        expected = prod(tensor.dims) * (2 if kind == "BF16" else NUMPY[kind].itemsize)
        if length not in (None, expected):
            raise BundleError(
                f"tensor {tensor.name!r} of shape {list(tensor.dims)} and datatype {kind} declares {length} "
                f"bytes of external data instead of {expected}"
            )
        length = expected
    stop = size if length is None else offset + length
    if offset > size or stop > size:
        raise BundleError(f"the data of tensor {tensor.name!r} ends at byte {stop}, but its file has {size} bytes")
    return offset, stop


def _number(tensor: _External, key: str) -> int | None:
    text = tensor.entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BundleError(f"the external data of tensor {tensor.name!r} has an invalid {key}: {text[:40]!r}")
    return int(text)


# In the children


def outline(payload: dict[str, Any], blobs: list[bytearray]) -> tuple[dict[str, Any], list[bytes]]:
    """The producer of a model, and the descriptions of its tensors with external data."""
    model = _decode(payload["what"], blobs[0])
    found = []
    for tensor in tensors_of(model):
        if _is_external(tensor):
            entries = {entry.key: entry.value for entry in tensor.external_data}
            found.append((tensor.name, list(tensor.dims), tensor.data_type, entries))
        if len(found) > MAX_EXTERNAL:
            raise BundleError(
                f"{payload['what']} has more than {MAX_EXTERNAL} tensors with external data, the limit; save it in one "
                "file"
            )
    return {"producer": f"{model.producer_name} {model.producer_version}".strip(), "external": found}, []


def put_inside(payload: dict[str, Any], blobs: list[bytearray]) -> tuple[dict[str, Any], list[bytes]]:
    """The model with the data of these tensors inlined."""
    model = _decode(payload["what"], blobs[0])
    tensors = [tensor for tensor in tensors_of(model) if _is_external(tensor)]
    for tensor, value in zip(tensors, blobs[1:], strict=True):
        tensor.raw_data = bytes(value)
        tensor.ClearField("external_data")
        tensor.data_location = TensorProto.DEFAULT
    return {}, [model.SerializeToString()]


def _decode(what: str, data: bytearray) -> ModelProto:
    try:
        return onnx.load_model_from_string(bytes(data))
    except Exception as error:  # protobuf's classes differ between implementations; none identifies a lack of memory
        raise BundleError(
            f"{what} is not an ONNX model: its bytes cannot be decoded, or exceed the memory limit"
        ) from error


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL or tensor.external_data)
