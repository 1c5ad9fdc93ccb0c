"""Reads NumPy files, IDX images and scikit-learn's bundled data sets as Arrow tables."""

import importlib.util
import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from maas_ray.data.sources.bounds import allowed_bytes
from maas_ray.data.sources.files import read_bytes
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from maas_ray.foreign.npy import read_npy, read_npz

_SHAPE = b"maas_ray.shape"
_IDX_TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
MAX_IDX_DIMENSIONS = 8
_SKLEARN = ("digits", "breast_cancer", "diabetes", "wine", "iris")


def tensor_field(name: str, values: NDArray[Any]) -> tuple[pa.Field, pa.Array]:
    """Tensors [N, *shape] as a fixed-size list; the field's metadata contains the shape."""
    shape = values.shape[1:]
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    array = pa.FixedSizeListArray.from_arrays(flat, math.prod(shape))
    return pa.field(name, array.type, metadata={_SHAPE: ",".join(map(str, shape)).encode()}), array


def tensor_shape(field: pa.Field) -> tuple[int, ...] | None:
    """The shape stored by `tensor_field`, that of a plain fixed-size list, or None for any other field."""
    if not pa.types.is_fixed_size_list(field.type):
        return None
    noted = (field.metadata or {}).get(_SHAPE)
    return tuple(int(size) for size in noted.split(b",")) if noted else (field.type.list_size,)


def tensor_values(field: pa.Field, column: pa.ChunkedArray) -> NDArray[Any]:
    """The inverse of `tensor_field`: [N, *shape]."""
    shape = tensor_shape(field) or ()
    chunks = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    flat = np.concatenate(chunks) if chunks else np.empty(0, dtype=field.type.value_type.to_pandas_dtype())
    return flat.reshape(-1, *shape)


def read_numpy(spec: DataSpec) -> pa.Table:
    """`.npz` with named arrays, or a `.npy` array (column `x`) and a `.npy` target (`labels_uri`).

    Raises:
        DataError: the files are not NumPy files, contain Python objects, or contain arrays of different lengths.
    """
    data = read_bytes(spec, spec.uri)
    if zipfile.is_zipfile(io.BytesIO(data)):
        return _table(spec.uri, read_npz(spec.uri, data, allowed_bytes(spec, len(data))))
    if spec.labels_uri is None:
        raise DataError(f"{spec.uri} contains a single array; set data.labels_uri to the file of the target")
    target = read_npy(spec.labels_uri, read_bytes(spec, spec.labels_uri))
    return _table(spec.uri, {"x": read_npy(spec.uri, data), spec.target: target})


def read_idx(spec: DataSpec) -> pa.Table:
    """IDX images (column `image`, [1, height, width] per row) and labels, the format of MNIST.

    The format is described at the end of http://yann.lecun.com/exdb/mnist/.

    Raises:
        DataError: a file is missing, truncated or not IDX, or the numbers of images and labels differ.
    """
    labels_uri = spec.labels_uri or spec.uri.replace("images-idx3", "labels-idx1")
    if labels_uri == spec.uri:
        raise DataError(f"{spec.uri}: the name does not contain images-idx3; set data.labels_uri to the labels' file")
    images = _parse_idx(spec.uri, read_bytes(spec, spec.uri))
    labels = _parse_idx(labels_uri, read_bytes(spec, labels_uri))
    if images.ndim < 2 or labels.ndim != 1:
        raise DataError(
            f"{spec.uri} has {images.ndim} dimensions and {labels_uri} has {labels.ndim}; expected at least 2 for the "
            "images and 1 for the labels"
        )
    return _table(spec.uri, {"image": images[:, None] if images.ndim == 3 else images, spec.target: labels})


def read_sklearn(name: str, target: str) -> pa.Table:
    """A data set that scikit-learn ships: digits as images [1, 8, 8], the others as numeric columns.

    Raises:
        DataError: there is no such data set.
    """
    if name not in _SKLEARN:
        raise DataError(f"sklearn:{name} is unknown; use one of {', '.join(_SKLEARN)}")
    if name == "digits" and (path := digits_path()) is not None:
        values = np.loadtxt(path, delimiter=",")
        images = values[:, :-1].reshape(-1, 1, 8, 8).astype(np.float32)
        return _table(name, {"image": images, target: values[:, -1].astype(np.int64)})
    from sklearn import datasets  # slow to import, and only this source needs it

    options = {"scaled": False} if name == "diabetes" else {}
    bunch = getattr(datasets, f"load_{name}")(**options)
    if name == "digits":
        return _table(name, {"image": bunch.images[:, None].astype(np.float32), target: bunch.target})
    columns = {str(column): bunch.data[:, i] for i, column in enumerate(bunch.feature_names)}
    has_classes = "target_names" in bunch
    values = np.asarray(bunch.target_names, dtype=str)[bunch.target] if has_classes else bunch.target
    return _table(name, {**columns, target: values})


def digits_path() -> Path | None:
    """The file behind `load_digits`, which the examples use: importing scikit-learn to read it takes 2 s."""
    package = importlib.util.find_spec("sklearn")
    path = Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if package else None
    return path if path is not None and path.is_file() else None


def _parse_idx(uri: str, data: bytes) -> NDArray[Any]:
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in _IDX_TYPES or len(data) < 4 + 4 * data[3]:
        raise DataError(f"{uri} is not an IDX file: its header is {data[:4].hex()!r}")
    if data[3] > MAX_IDX_DIMENSIONS:
        raise DataError(f"{uri} has {data[3]} dimensions; the limit is {MAX_IDX_DIMENSIONS}")
    shape = tuple(int(size) for size in np.frombuffer(data, dtype=">u4", count=data[3], offset=4))
    dtype = np.dtype(_IDX_TYPES[data[2]])
    body = memoryview(data)[4 + 4 * data[3] :]
    expected = math.prod(shape) * dtype.itemsize
    if len(body) != expected or not expected:
        raise DataError(
            f"{uri} contains {len(body)} bytes of values; expected {expected} for the shape {shape} in its header"
        )
    return np.frombuffer(body, dtype=dtype).reshape(shape).astype(dtype.newbyteorder("="))


def _table(where: str, arrays: Mapping[str, NDArray[Any]]) -> pa.Table:
    fields, columns = [], []
    for name, values in arrays.items():
        if values.ndim == 0 or values.dtype.kind not in "biufUS":
            raise DataError(
                f"array {name!r} of {where} is {values.dtype} {values.shape}; expected numbers or text per row"
            )
        if values.ndim > 1 and (values.dtype.kind not in "biuf" or not math.prod(values.shape[1:])):
            raise DataError(
                f"array {name!r} of {where} is {values.dtype} {values.shape}; a tensor must contain numbers"
            )
        if values.ndim > 1:
            field, array = tensor_field(name, values)
        else:
            text = values.dtype.kind in "US"
            array = pa.array(values.astype(str).tolist(), pa.string()) if text else pa.array(values)
            field = pa.field(name, array.type)
        fields.append(field)
        columns.append(array)
    lengths = {name: len(values) for name, values in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise DataError(f"the arrays of {where} have different numbers of rows: {lengths}")
    if not columns or not len(columns[0]):
        raise DataError(f"{where} has no rows")
    return pa.table(columns, schema=pa.schema(fields))
