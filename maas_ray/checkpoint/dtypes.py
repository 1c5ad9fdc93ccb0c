"""Names of element types in safetensors files and in manifests."""

import torch

from maas_ray.errors import ModelError

NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {name: dtype for dtype, name in NAMES.items()}


def name_of(tensor: str, dtype: torch.dtype) -> str:
    """The name of a type.

    Raises:
        ModelError: safetensors has no such type.
    """
    found = NAMES.get(dtype)
    if found is None:
        raise ModelError(f"tensor {tensor!r} has type {dtype}, which cannot be stored; use one of {', '.join(DTYPES)}")
    return found
