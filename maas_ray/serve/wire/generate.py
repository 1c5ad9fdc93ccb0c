"""Generate extension: a flat JSON object as the request and the response of one row. Independent of HTTP.

Source: triton-inference-server/server, docs/protocol/extension_generate.md. A key with the name of an input is that
input; `parameters` and all other keys are parameters of the request. An output is a value, or a list of several.
"""

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import orjson

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BadRequest, BodyTooLarge
from maas_ray.serve.wire.answer import json_data
from maas_ray.serve.wire.checks import InferRequest, check_id, complete_inputs, wanted_outputs
from maas_ray.serve.wire.other_forms import OtherForms, pending
from maas_ray.serve.wire.parameters import request_parameters
from maas_ray.serve.wire.tensors import read_json, short

MAX_BYTES = 256 << 10
"""Maximum body size: it is parsed in one step."""


def read_generate(body: bytes | memoryview, signature: Signature) -> InferRequest:
    """Parses a request of one row.

    Args:
        body: JSON in UTF-8.
        signature: inputs and outputs of the addressed model version.

    Raises:
        BodyTooLarge: larger than one row should ever need.
        BadRequest: malformed, or it does not match the signature.
    """
    if len(body) > MAX_BYTES:
        raise BodyTooLarge(f"the body has {len(body)} bytes, the limit of generate is {MAX_BYTES}; use infer")
    document = _load(bytes(body))
    specs = {tensor.name: tensor for tensor in signature.inputs}
    found: dict[str, Array] = {}
    parameters: dict[str, Any] = {}
    request_id = None
    for name, value in document.items():
        if name in specs:
            found[name] = _read(specs[name], value, signature.is_batched)
        elif name == "parameters":
            if value is not None and type(value) is not dict:
                raise BadRequest("parameters of the request is not an object")
            parameters |= value or {}
        elif name == "id":
            request_id = check_id(value)
        else:
            parameters[name] = value
    options = request_parameters(parameters)
    encoded = pending(found, specs)
    outputs = {tensor.name: tensor for tensor in signature.outputs}
    return InferRequest(
        request_id,
        complete_inputs(found, specs),
        wanted_outputs((), outputs, is_binary=False),
        1,
        options.timeout_us,
        options.priority,
        encoded,
    )


def write_generate(
    model: str,
    version: int,
    request: InferRequest,
    outputs: Mapping[str, Array],
    to_json: Callable[[str, Array], bytes] = json_data,
) -> bytes:
    """Returns the JSON of a response; `to_json` returns the values of an output by its name.

    Raises:
        BadRequest: an output that JSON cannot represent.
    """
    names: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if request.id is not None:
        names["id"] = request.id
    parts = [orjson.dumps(names)[:-1]]
    for wanted in request.outputs:
        array = outputs[wanted.name]
        data = to_json(wanted.name, array)
        parts.append(b",%b:%b" % (orjson.dumps(wanted.name), data[1:-1] if array.size == 1 else data))
    return b"".join([*parts, b"}"])


def as_event(document: bytes) -> bytes:
    """Returns a JSON document as a server-sent event."""
    return b"data: %b\n\n" % document


def _load(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is not JSON in UTF-8: {error.msg} at character {error.pos}") from None
    if type(document) is not dict:
        raise BadRequest("the body is not a JSON object; send {INPUT: value, ...}")
    return document


def _read(spec: TensorSpec, value: Any, is_batched: bool) -> Array:
    data = value if type(value) is list else [value]
    if spec.encoding is not None and data and type(data[0]) is str:
        spec = OtherForms([spec]).spec(spec, "BYTES", [1])
    return read_json(spec, _shape(spec, len(data), is_batched and not spec.optional), data)


def _shape(spec: TensorSpec, count: int, is_batched: bool) -> tuple[int, ...]:
    """Returns the shape of one row; at most one other variable size, derived from the number of values."""
    sizes = (1, *spec.shape[1:]) if is_batched else spec.shape
    free = sizes.count(-1)
    if free == 0:
        return tuple(sizes)
    fixed = prod(size for size in sizes if size != -1)
    if free > 1 and count != 1:
        raise BadRequest(
            f"input {spec.name!r}: {short(count)} values do not define the {free} variable sizes of "
            f"{list(spec.shape)}; use infer, whose requests have a shape"
        )
    rest = count // fixed if fixed else 0
    return tuple((rest if free == 1 else 1) if size == -1 else size for size in sizes)
