"""Reads slices of weights from a folder in Hugging Face's format in any store. Independent of process groups.

Each weight file begins with the length of its JSON header and the header (https://huggingface.co/docs/safetensors), so
a rank fetches only the rows that it needs. Nothing is unpickled.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from maas_ray.checkpoint.dtypes import DTYPES
from maas_ray.errors import MaasError, ModelError
from maas_ray.foreign.documents import read_json
from maas_ray.models.hugging_face.local import (
    CONFIG,
    INDEX,
    MAX_JSON_BYTES,
    WEIGHTS,
    check_folder,
    files_of_index,
    read_object,
    too_large,
)
from maas_ray.spec import canonical_json
from maas_ray.store.objects import ObjectStore, StorageSpec, open_store

MAX_DIMS = 8
REQUEST_BYTES = 64 << 20


@dataclass(frozen=True)
class Weight:
    """The location of one tensor in a file."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class HfFolder:
    """A folder with config.json and weight files.

    Args:
        uri: a directory, or a URI as in `StorageSpec`.
        endpoint: URL of an S3-compatible service.

    Raises:
        ModelError: there is no such folder, or, on access, a file in it cannot be read.
    """

    def __init__(self, uri: str, endpoint: str | None = None) -> None:
        self.uri = uri
        path = Path(uri.removeprefix("file://")).expanduser()
        if "://" not in uri or uri.startswith("file://"):
            if not path.is_dir():
                raise ModelError(f"the directory {uri} does not exist; give a folder in Hugging Face's format")
            check_folder(path)
        self._store: ObjectStore = open_store(StorageSpec(uri=uri, endpoint=endpoint if "s3://" in uri else None))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The content of config.json."""
        if CONFIG not in self._sizes:
            raise ModelError(f"{self.uri}/{CONFIG} does not exist; give a folder that contains it")
        return self._object(CONFIG)

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        """Bytes of each file, by name; without files in subfolders."""
        return {info.key: info.size for info in self._store.scan("") if "/" not in info.key}

    def _object(self, name: str) -> dict[str, Any]:
        source = f"{self.uri}/{name}"
        if self._sizes[name] > MAX_JSON_BYTES:
            raise too_large(source, self._sizes[name])
        return read_object(self._store.get(name), source)

    @cached_property
    def weights(self) -> Mapping[str, Weight]:
        """Every tensor by name: in model.safetensors, else in the files in the index, else in all *.safetensors.

        transformers has the same order, so other files in the folder (an adapter, another format) are ignored.
        """
        found: dict[str, Weight] = {}
        for name, size in self._files():
            try:
                for key, weight in self._header(name, size):
                    if key in found:
                        raise ValueError(f"{key} is already in {found[key].file}")
                    found[key] = weight
            except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, MaasError) as error:
                raise ModelError(
                    f"cannot read {self.uri}/{name} as safetensors: {error}; copy the whole folder again"
                ) from error
        return found

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Reads a slice of a tensor in the datatype of the file; fetches the rows that contain the slice."""
        weight = self.weights[name]
        rows = slice(offsets[0], offsets[0] + sizes[0]) if weight.shape else slice(0, 1)
        row_bytes = weight.nbytes // weight.shape[0] if weight.shape and weight.shape[0] else weight.nbytes
        data = bytearray().join(
            self._range(weight.file, weight.start + start, weight.start + stop)
            for start, stop in _cut(rows.start * row_bytes, rows.stop * row_bytes)
        )
        if not data:
            return torch.empty(tuple(sizes), dtype=weight.dtype)
        shape = (sizes[0], *weight.shape[1:]) if weight.shape else ()
        values = torch.frombuffer(data, dtype=weight.dtype).view(shape)
        for dim in range(1, len(shape)):
            values = values.narrow(dim, offsets[dim], sizes[dim])
        return values

    def digest(self) -> str:
        """Hex sha256 of config.json, if any, and of all weights: identifies the weights that a run started from."""
        whole = sha256(canonical_json(self.config if CONFIG in self._sizes else {}))
        for name, size in self._files():
            whole.update(f"{name} {size}\n".encode())
            for start, stop in _cut(0, size):
                whole.update(self._range(name, start, stop))
        return whole.hexdigest()

    def _files(self) -> list[tuple[str, int]]:
        found = [(name, size) for name, size in self._sizes.items() if name.endswith(".safetensors")]
        if not found:
            raise ModelError(
                f"{self.uri} contains no *.safetensors; pickled weights (pytorch_model.bin) are not read; convert them "
                "with save_pretrained"
            )
        listed = self._listed({name for name, _ in found})
        return [(name, size) for name, size in found if name in listed]

    def _listed(self, names: set[str]) -> set[str]:
        if WEIGHTS in names:
            return {WEIGHTS}
        if INDEX not in self._sizes:
            return names
        listed = files_of_index(self._object(INDEX), f"{self.uri}/{INDEX}")
        if absent := sorted(listed - names):
            raise ModelError(
                f"{self.uri} does not contain {absent[0]}, which its {INDEX} names; copy the whole folder again"
            )
        return listed

    def _header(self, name: str, size: int) -> Iterator[tuple[str, Weight]]:
        length = int.from_bytes(self._range(name, 0, min(8, size)), "little")
        begin = 8 + length
        if size < 8 or length > MAX_JSON_BYTES or begin > size:
            raise ValueError(f"its header has {length} bytes, but the file has {size}")
        num_bytes = 0
        for key, about in read_json(self._range(name, 8, begin)).items():
            if key == "__metadata__":
                continue
            (start, stop), shape = about["data_offsets"], tuple(about["shape"])
            if not _are_sizes((start, stop, *shape)) or len(shape) > MAX_DIMS:
                raise ValueError(f"{key} has an invalid shape or invalid offsets")
            weight = Weight(name, DTYPES[about["dtype"]], shape, begin + start)
            num_bytes += weight.nbytes
            if begin + stop > size or stop - start != weight.nbytes or num_bytes > size - begin:
                raise ValueError(f"{key} is outside the file, or its size does not match its shape")
            yield key, weight

    def _range(self, name: str, start: int, stop: int) -> bytes:
        if stop <= start:
            return b""
        (data,) = self._store.get_ranges(name, [(start, stop)])
        if len(data) != stop - start:
            raise ModelError(f"{self.uri}/{name} ends before byte {stop}; copy the whole folder again")
        return data


def _are_sizes(values: Sequence[Any]) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 63 for value in values)


def _cut(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for begin in range(start, stop, REQUEST_BYTES):
        yield begin, min(begin + REQUEST_BYTES, stop)
