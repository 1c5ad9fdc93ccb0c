"""Reads the sample values for a model's first runs from an untrusted file. Independent of graphs."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from maas_ray import confined
from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Signature
from maas_ray.bundle.sample import MAX_BYTES, checked, from_document, read_sample, write_sample
from maas_ray.confined import Limits
from maas_ray.errors import ConfinedError, SpecError
from maas_ray.foreign.files import Unreadable, read_file

_LIMITS = Limits(wall_s=30.0, cpu_s=30.0, memory_bytes=512 << 20)


def read_sample_file(path: Path, signature: Signature) -> dict[str, Array]:
    """Reads the values of a file in a child process with limits.

    Args:
        path: `.npz` with one array per input, or `.json` with a request of the Open Inference Protocol v2.
        signature: signature of the graph.

    Raises:
        SpecError: it cannot be read, or does not fit the signature.
    """
    try:
        data = read_file(path, MAX_BYTES)
    except FileNotFoundError as error:
        raise SpecError(f"the sample {path} does not exist") from error
    except Unreadable as error:
        raise SpecError(f"the sample {path} {error}") from error
    payload = {"is_npz": path.suffix == ".npz", "signature": signature.model_dump(mode="json")}
    try:
        found = confined.call(f"{__name__}:parse", payload, [data], _LIMITS, what=f"the sample {path.name}")
    except ConfinedError as error:
        raise SpecError(f"cannot read the sample {path}: {error}") from error
    return read_sample(bytes(found.blobs[0]), signature)


def parse(payload: dict[str, Any], blobs: list[bytearray]) -> tuple[dict[str, Any], list[bytes]]:
    """The child's side: converts a file's bytes to a sample in the bundle's format."""
    signature = Signature.model_validate(payload["signature"])
    values = _from_npz(bytes(blobs[0]), signature) if payload["is_npz"] else _from_json(bytes(blobs[0]), signature)
    return {}, [write_sample(values, signature)]


def _from_json(data: bytes, signature: Signature) -> dict[str, Array]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SpecError("the sample is not JSON; give a request of the v2 protocol, or an .npz file") from error
    if not isinstance(document, dict):
        raise SpecError("the sample is not a request of the v2 protocol: it has no list of inputs")
    return from_document(document, signature)


def _from_npz(data: bytes, signature: Signature) -> dict[str, Array]:
    kinds = {tensor.name: tensor.datatype for tensor in signature.inputs}
    found: dict[str, Array] = {}
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            for name in arrays.files:
                if name not in kinds:
                    raise SpecError(
                        f"the sample contains the array {name[:100]!r}; the model's inputs are {sorted(kinds)}"
                    )
                array = arrays[name]
                is_text = kinds[name] == "BYTES"
                found[name] = array.astype(str).astype(object) if is_text else array.astype(NUMPY[kinds[name]])
    except (ValueError, OSError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise SpecError("the sample is not an .npz file with one array of numbers or strings per input") from error
    return checked(found, signature)
