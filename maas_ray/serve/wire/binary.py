"""Binary tensors: conversion to and from arrays, as defined by the binary tensor extension.

Source: triton-inference-server/server, docs/protocol/extension_binary_data.md: little-endian, row-major, no padding;
BOOL is a byte of 0 or 1; an element of BYTES is four bytes of length and then its bytes. Every size is validated before
anything is allocated. Arrays of the other datatypes are views of the received bytes.
"""

from collections.abc import Callable
from math import prod

import numpy as np

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import TensorSpec
from maas_ray.bundle.strings import decode, encode
from maas_ray.errors import BadRequest

_LENGTH = 4
_MAX_DIGITS = 18


def read_header_length(value: bytes) -> int:
    """Returns the value of the header `Inference-Header-Content-Length`.

    Raises:
        BadRequest: it is not a number of bytes.
    """
    if not (value.isdigit() and len(value) <= _MAX_DIGITS):
        raise BadRequest(
            f"inference-header-content-length {value[:40].decode('latin-1')!r} is not a non-negative integer; send the "
            "number of bytes of JSON before the tensors, or 0 for a raw tensor"
        )
    return int(value)


_HUGE_BYTES = 4 << 20


def body_buffer(num_bytes: int, header_length: int) -> memoryview:
    """Returns memory for a body whose first tensor will be aligned, so that it can be used without a copy.

    The memory is not cleared: it must not be read before it has been filled.
    """
    padding = -header_length % 8
    size = padding + num_bytes
    # numpy's memory is not zeroed, but above this size it requests huge pages, which are mapped and unmapped by
    # megabytes.
    buffer = np.empty(size, np.uint8).data if size < _HUGE_BYTES else memoryview(bytearray(size))
    return buffer[padding:]


def read_binary(spec: TensorSpec, shape: tuple[int, ...], data: memoryview) -> Array:
    """Returns a tensor from its bytes.

    Args:
        spec: input of the signature.
        shape: declared and validated shape.
        data: exactly the bytes of the tensor.

    Returns:
        Array of `shape`; BF16 as uint16 bits, BYTES as objects of `str`; otherwise a view of `data`, unless that
        is not aligned.

    Raises:
        BadRequest: too few or too many bytes for the shape, a BOOL that is neither 0 nor 1, or an element of BYTES
            beyond the end of the tensor.
    """
    if spec.datatype == "BYTES":
        return read_elements(spec, shape, data, decode)
    dtype = NUMPY[spec.datatype]
    count = prod(shape)
    if len(data) != count * dtype.itemsize:
        raise BadRequest(
            f"input {spec.name!r}: {len(data)} bytes of binary data, shape {list(shape)} of {spec.datatype} needs "
            f"{count * dtype.itemsize}"
        )
    if not count:
        return np.empty(shape, dtype)
    array: Array = np.ndarray(shape, dtype, data)
    if spec.datatype == "BOOL" and array.view(np.uint8).max() > 1:
        index = int(np.argmax(array.view(np.uint8).ravel() > 1))
        raise BadRequest(f"input {spec.name!r}: element {index} of BOOL is the byte {data[index]}; send 0 or 1")
    # Compilers build kernels for aligned loads of integers: a client's odd header length must not reach those.
    return array if array.flags.aligned else array.copy()


def raw_shape(spec: TensorSpec, is_batched: bool, num_bytes: int) -> tuple[int, ...]:
    """Returns the shape of a raw request's only input: one row, and at most one other variable size, from the bytes.

    Raises:
        BadRequest: two variable sizes, a size that is not a whole number, or BYTES of more than one element.
    """
    sizes = (1, *spec.shape[1:]) if is_batched else spec.shape
    num_variable = sizes.count(-1)
    if num_variable > 1:
        raise BadRequest(
            f"input {spec.name!r}: a raw request cannot define the {num_variable} variable sizes of "
            f"{list(spec.shape)}; send a request with a JSON header"
        )
    fixed = prod(size for size in sizes if size != -1)
    if spec.datatype == "BYTES":
        if fixed != 1:
            raise BadRequest(
                f"input {spec.name!r}: a raw request has one element of BYTES, the model needs {list(spec.shape)}; "
                "send a request with a JSON header"
            )
        return tuple(1 if size == -1 else size for size in sizes)
    row_bytes = fixed * NUMPY[spec.datatype].itemsize
    if not num_variable or not row_bytes:
        return tuple(max(size, 0) for size in sizes)
    if num_bytes % row_bytes:
        raise BadRequest(
            f"input {spec.name!r}: {num_bytes} raw bytes are not a multiple of the {row_bytes} bytes that "
            f"{list(spec.shape)} of {spec.datatype} needs"
        )
    return tuple(num_bytes // row_bytes if size == -1 else size for size in sizes)


def read_raw_string(spec: TensorSpec, shape: tuple[int, ...], data: memoryview) -> Array:
    """Returns the body of a raw request as the only element of a BYTES tensor, without a length before it."""
    array = np.empty(1, dtype=object)
    array[0] = decode(data)
    return array.reshape(shape)


def write_binary(array: Array) -> bytes | Array:
    """Returns the bytes of a tensor, or an array whose buffer contains those bytes."""
    return write_strings(array) if array.dtype == object else np.ascontiguousarray(array)


def write_strings(array: Array) -> bytes:
    """Returns the bytes of a BYTES tensor."""
    parts = []
    for element in array.ravel().tolist():
        text = encode(element)
        parts.append(len(text).to_bytes(_LENGTH, "little"))
        parts.append(text)
    return b"".join(parts)


def read_elements(
    spec: TensorSpec, shape: tuple[int, ...], data: memoryview, convert: Callable[[memoryview], object] = bytes
) -> Array:
    """Returns a BYTES tensor, whose elements are those of the binary data, each converted; raises as `read_binary`."""
    count, total = prod(shape), len(data)
    if count * _LENGTH > total:
        raise BadRequest(
            f"input {spec.name!r}: {total} bytes of binary data are too few for the {count} elements of shape "
            f"{list(shape)}, each of which begins with {_LENGTH} bytes of length"
        )
    array = np.empty(count, dtype=object)
    offset = 0
    for index in range(count):
        start = offset + _LENGTH
        if start > total:
            raise BadRequest(
                f"input {spec.name!r}: the binary data ends within the length of element {index}; shape {list(shape)} "
                f"needs {count} elements"
            )
        length = int.from_bytes(data[offset:start], "little")
        offset = start + length
        if offset > total:
            raise BadRequest(
                f"input {spec.name!r}: element {index} has a length of {length} bytes, but only "
                f"{total - start} bytes of the tensor are left"
            )
        array[index] = convert(data[start:offset])
    if offset != total:
        raise BadRequest(
            f"input {spec.name!r}: {total - offset} bytes are left over after the {count} elements of shape {list(shape)}"
        )
    return array.reshape(shape)


def num_binary_bytes(encoded: bytes | Array) -> int:
    """Returns the length of a result of `write_binary`."""
    return len(encoded) if isinstance(encoded, bytes) else encoded.nbytes
