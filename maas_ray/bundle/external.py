"""Reads an ONNX file and puts the weights that lie beside it inside. Runs nothing, and follows no path out of the folder.

External data is a file name, an offset and a length inside the model (onnx.proto3, `TensorProto.external_data`): all
three come from whoever wrote the file, so they are checked before a byte is read.
"""

from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto

from maas_ray.bundle.datatypes import NUMPY, ONNX
from maas_ray.bundle.inspect import MAX_GRAPH_BYTES, tensors_of
from maas_ray.errors import BundleError, NotFound
from maas_ray.foreign import Unreadable, open_beside, open_file, open_folder


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
    try:
        with open_folder(path.parent) as folder:
            return _read(path, folder)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotFound(f"there is no file {path}") from error
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path, folder: int) -> OnnxFile:
    try:
        with open_file(path.name, MAX_GRAPH_BYTES, folder=folder) as opened:
            data = opened.read(0, opened.size)
    except Unreadable as error:
        raise BundleError(f"{path} {error}") from error
    try:
        model = onnx.load_model_from_string(data)
    except Exception as error:  # protobuf's classes differ between its implementations
        raise BundleError(f"{path} is not an ONNX model: its bytes cannot be decoded") from error
    digest = sha256(data)
    by_file: dict[str, list[TensorProto]] = {}
    for tensor in tensors_of(model):
        if _is_external(tensor):
            by_file.setdefault(_location(tensor), []).append(tensor)
    if by_file:
        left = MAX_GRAPH_BYTES - len(data)
        for name, tensors in sorted(by_file.items()):
            left = _put_inside(folder, name, tensors, left, digest.update)
        data = model.SerializeToString()
    return OnnxFile(data, digest.hexdigest(), f"{model.producer_name} {model.producer_version}".strip())


def _put_inside(folder: int, name: str, tensors: list[TensorProto], left: int, seen: Callable[[bytes], object]) -> int:
    """Moves the data of tensors from a file beside the model into them; returns how many bytes may still follow.

    `seen` gets every byte of the file.
    """
    where = f"the file {name!r} with the data of tensor {tensors[0].name!r}"
    try:
        with open_beside(folder, name, MAX_GRAPH_BYTES) as opened:
            for tensor in tensors:
                start, stop = _part(tensor, opened.size)
                left -= stop - start
                if left < 0:
                    raise Unreadable(
                        f"makes the model larger than {MAX_GRAPH_BYTES} bytes, the largest message of protocol "
                        "buffers; export the model in half precision or in parts"
                    )
                tensor.raw_data = opened.read(start, stop)
                tensor.ClearField("external_data")
                tensor.data_location = TensorProto.DEFAULT
            for chunk in opened.chunks():
                seen(chunk)
    except FileNotFoundError as error:
        raise BundleError(f"{where} is missing; it must lie beside the model") from error
    except Unreadable as error:
        raise BundleError(f"{where} {error}") from error
    return left


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


def _part(tensor: TensorProto, size: int) -> tuple[int, int]:
    """First and last byte of a tensor's data in a file of `size` bytes."""
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
    stop = size if length is None else offset + length
    if offset > size or stop > size:
        raise BundleError(f"the data of tensor {tensor.name!r} is said to end at byte {stop} of a file that has {size}")
    return offset, stop


def _number(tensor: TensorProto, entries: dict[str, str], key: str) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise BundleError(f"the external data of tensor {tensor.name!r} has the {key} {text[:40]!r}, which is no size")
    return int(text)
