"""Datatypes other than the graph's in which an input may be sent: BOOL for booleans, BYTES for image files and texts.

A reader of requests gets a spec for the declared datatype, reads the tensor by it, and converts the result.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import TensorSpec
from maas_ray.errors import BadRequest
from maas_ray.serve.wire.tensors import short

_MAGICS = (b"\x89PNG", b"\xff\xd8\xff", b"BM", b"RIFF", b"II*\0", b"MM\0*", b"GIF8")


class OtherForms:
    """The other forms of all inputs of one version.

    Args:
        inputs: inputs of the signature.
    """

    def __init__(self, inputs: Iterable[TensorSpec]) -> None:
        self._forms: dict[tuple[str, str], tuple[TensorSpec, ...]] = {}
        for tensor in inputs:
            if tensor.boolean:
                self._forms[tensor.name, "BOOL"] = (tensor.model_copy(update={"datatype": "BOOL"}),)
            if tensor.encoding is not None:
                plain = {"datatype": "BYTES", "nullable": False, "encoding": None}
                self._forms[tensor.name, "BYTES"] = tuple(
                    tensor.model_copy(update={**plain, "shape": shape}) for shape in ((-1,), (-1, 1))
                )
        self.has_encodings = any(tensor.encoding is not None for tensor in inputs)
        """Whether an input takes encoded values."""

    def __bool__(self) -> bool:
        return bool(self._forms)

    def spec(self, spec: TensorSpec, datatype: Any, shape: Any) -> TensorSpec:
        """The spec by which an input of the declared datatype and shape is read.

        Raises:
            BadRequest: the input does not have this datatype.
        """
        if datatype == spec.datatype:
            return spec
        forms = self._forms.get((spec.name, datatype)) if type(datatype) is str else None
        if forms is None:
            also = "".join(f" or {other}" for other in (*spec.accepts, spec.wire_datatype) if other != spec.datatype)
            raise BadRequest(
                f"input {spec.name!r}: datatype {short(datatype)} is not the model's {spec.datatype}{also}"
            )
        return next((form for form in forms if type(shape) is list and len(form.shape) == len(shape)), forms[0])

    @staticmethod
    def convert(spec: TensorSpec, array: Array) -> Array:
        """The tensor of the graph, from one that was read in another form; elements of BYTES are decoded later."""
        return array.astype(np.float32) if spec.boolean and array.dtype != np.float32 else array


def pending(inputs: Mapping[str, Array], specs: Mapping[str, TensorSpec]) -> tuple[str, ...]:
    """The inputs whose elements must still be decoded."""
    return tuple(name for name, array in inputs.items() if array.dtype == object and specs[name].encoding is not None)


def read_image_file(spec: TensorSpec, data: memoryview) -> Array | None:
    """The body of a raw request as an image file; None if it is a tensor."""
    if spec.encoding is None or spec.encoding.kind != "image" or not bytes(data[:4]).startswith(_MAGICS):
        return None
    array = np.empty(1, dtype=object)
    array[0] = bytes(data)
    return array
