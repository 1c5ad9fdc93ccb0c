"""Reads an ONNX file and puts the weights that lie beside it inside. Runs nothing, and follows no path out of the folder.

External data is a file name, an offset and a length inside the model (onnx.proto3, `TensorProto.external_data`): all
three come from whoever wrote the file, so they are checked before a byte is read.
"""

import os
import stat
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto

from maas_ray.bundle.datatypes import NUMPY, ONNX
from maas_ray.bundle.inspect import MAX_GRAPH_BYTES, tensors_of
from maas_ray.errors import BundleError, NotFound


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX model as one piece."""

    graph: bytes
    """The serialized `ModelProto`, weights inline."""
    sha256: str
    """Hex digest of the file followed by the files of its external data in the order of their names."""
    producer: str
    """The program that wrote it, as the file says."""


def read_onnx(path: Path) -> OnnxFile:
    """Reads a model with its external data.

    Args:
        path: the file; external data must lie in the same folder, as plain files and not as links.

    Raises:
        NotFound: there is no such file.
        BundleError: not an ONNX model, or its external data is not where or what it may be; the message names the
            tensor and the reason.
    """
    data = _read_model(path)
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's classes differ between its implementations
        raise BundleError(f"{path} is not an ONNX model: its bytes cannot be decoded") from error
    digest = sha256(data)
    external = [tensor for tensor in tensors_of(model) if _is_external(tensor)]
    if external:
        files: dict[str, bytes] = {}
        num_bytes = len(data)
        for tensor in external:
            name = _location(tensor)
            if name not in files:
                files[name] = _read_beside(path.parent, name, tensor)
            content = _part(tensor, files[name])
            num_bytes += len(content)
            _check_total(path, num_bytes)
            tensor.raw_data = content
            tensor.ClearField("external_data")
            tensor.data_location = TensorProto.DEFAULT
        for _, content in sorted(files.items()):
            digest.update(content)
        data = model.SerializeToString()
    return OnnxFile(data, digest.hexdigest(), f"{model.producer_name} {model.producer_version}".strip())


def _read_model(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise BundleError(f"{path} is not a file")
        _check_total(path, size)
        return path.read_bytes()
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _is_external(tensor: TensorProto) -> bool:
    return bool(tensor.data_location == TensorProto.EXTERNAL or tensor.external_data)


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _location(tensor: TensorProto) -> str:
    name = _entries(tensor).get("location", "")
    if not name or name in (".", "..") or any(character in name for character in "/\\:\0"):
        raise BundleError(
            f"the data of tensor {tensor.name!r} is said to lie at {name[:120]!r}; only a plain file name in the "
            "model's own folder is read, save the model again with all its data in one file beside it"
        )
    return name


def _read_beside(folder: Path, name: str, tensor: TensorProto) -> bytes:
    """Opens without following a link, so that what was checked is what is read; a pipe would not block."""
    where = f"the file {name!r} with the data of tensor {tensor.name!r}"
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(folder / name, flags)
    except FileNotFoundError as error:
        raise BundleError(f"{where} is missing; it must lie beside the model") from error
    except OSError as error:
        raise BundleError(
            f"{where} cannot be opened ({error.strerror}); a link must be replaced by its file"
        ) from error
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise BundleError(f"{where} is not a plain file")
        _check_total(folder / name, status.st_size)
        return file.read(status.st_size)


def _part(tensor: TensorProto, content: bytes) -> bytes:
    entries = _entries(tensor)
    offset, length = _number(tensor, entries, "offset") or 0, _number(tensor, entries, "length")
    if any(size < 0 for size in tensor.dims):
        raise BundleError(f"tensor {tensor.name!r} has the impossible shape {list(tensor.dims)}")
    kind = ONNX.get(tensor.data_type)
    if kind == "BYTES":
        raise BundleError(f"tensor {tensor.name!r} holds strings, which cannot lie in another file")
    if kind is not None:
        expected = prod(tensor.dims) * (2 if kind == "BF16" else NUMPY[kind].itemsize)
        if length not in (None, expected):
            raise BundleError(
                f"tensor {tensor.name!r} of shape {list(tensor.dims)} and datatype {kind} is said to have {length} "
                f"bytes of external data instead of {expected}"
            )
        length = expected
    stop = len(content) if length is None else offset + length
    if offset > len(content) or stop > len(content):
        raise BundleError(
            f"the data of tensor {tensor.name!r} is said to end at byte {stop} of a file that has {len(content)}"
        )
    return content[offset:stop]


def _number(tensor: TensorProto, entries: dict[str, str], key: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BundleError(f"the external data of tensor {tensor.name!r} has the {key} {text[:40]!r}, which is no size")
    return int(text)


def _check_total(path: Path, num_bytes: int) -> None:
    if num_bytes > MAX_GRAPH_BYTES:
        raise BundleError(
            f"{path} has {num_bytes} bytes with its data; a bundle holds at most {MAX_GRAPH_BYTES}, "
            "which is the largest message of protocol buffers: export the model in half precision or in parts"
        )
