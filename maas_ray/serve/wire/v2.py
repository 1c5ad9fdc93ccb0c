"""Open Inference Protocol v2 over JSON: bytes to tensors and back, with every check against the signature.

Source: github.com/kserve/open-inference-protocol, specification/protocol/inference_rest.md. Knows no HTTP, queue or
engine. No extension is offered yet, and none is claimed; what belongs to one is refused instead of ignored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

import maas_ray
from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import BundleInfo, Signature, TensorSpec
from maas_ray.errors import BadRequest
from maas_ray.serve.wire.tensors import BINARY_ONLY, check_shape, read_json, short, write_json

PLATFORM = "onnxruntime_onnx"
MAX_ID_CHARS = 256

_REFUSED_PARAMETERS = {
    "binary_data_size": "the binary tensor extension is not offered here; send data as JSON (binary_data=False)",
    "classification": "the classification extension is not offered here; read the scores and the labels in the metadata",
    "shared_memory_region": "the shared memory extension is not offered here; send data as JSON",
    "sequence_id": "stateful sequences are not offered here",
    "sequence_start": "stateful sequences are not offered here",
    "sequence_end": "stateful sequences are not offered here",
}


@dataclass(frozen=True, slots=True)
class InferRequest:
    """A checked request: tensors fit the signature."""

    id: str | None
    inputs: dict[str, Array]
    outputs: tuple[str, ...]
    """Names of the wanted outputs, in the order in which they are answered."""
    num_rows: int
    """Size of the batch dimension as parsed; 1 for a model without one."""


def read_infer(body: bytes, signature: Signature) -> InferRequest:
    """Reads an inference request.

    Args:
        body: UTF-8 JSON.
        signature: what the addressed model version takes and gives.

    Raises:
        BadRequest: malformed, or it does not fit the signature.
    """
    document = _load(body)
    _check_parameters(document.get("parameters"), "the request")
    inputs = _list_of_objects(document, "inputs")
    if inputs is None:
        raise BadRequest("the request has no inputs; send {'inputs': [{name, shape, datatype, data}, ...]}")
    may_hold_bool = b"true" in body or b"false" in body
    tensors = _read_inputs(inputs, signature, may_hold_bool)
    return InferRequest(
        id=_read_id(document),
        inputs=tensors,
        outputs=_read_outputs(_list_of_objects(document, "outputs"), signature),
        num_rows=_num_rows(tensors, signature),
    )


def write_infer(
    model: str, version: int, request: InferRequest, outputs: Mapping[str, Array], signature: Signature
) -> bytes:
    """The answer to a request; NaN and infinity are written as null, because JSON has neither."""
    tensors = {tensor.name: tensor for tensor in signature.outputs}
    answer: dict[str, Any] = {"model_name": model, "model_version": str(version)}
    if request.id is not None:
        answer["id"] = request.id
    answer["outputs"] = [
        {
            "name": name,
            "datatype": tensors[name].datatype,
            "shape": outputs[name].shape,
            "data": write_json(outputs[name]),
        }
        for name in request.outputs
    ]
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def write_error(message: str) -> bytes:
    """The protocol's only form of an error."""
    return orjson.dumps({"error": message})


def server_metadata() -> dict[str, Any]:
    """Answer to `GET v2`; only extensions that are really there are listed."""
    return {"name": "maas-ray", "version": maas_ray.__version__, "extensions": []}


def model_metadata(
    name: str, versions: Sequence[int], info: BundleInfo, parameters: Mapping[str, Any]
) -> dict[str, Any]:
    """Answer to `GET v2/models/{name}`; `parameters` is our addition and carries what the protocol has no place for."""
    labels = {"labels": info.labels} if info.labels is not None else {}
    return {
        "name": name,
        "versions": [str(version) for version in versions],
        "platform": PLATFORM,
        "inputs": [_describe(tensor) for tensor in info.signature.inputs],
        "outputs": [_describe(tensor) for tensor in info.signature.outputs],
        "parameters": {"task": info.task, **labels, **parameters},
    }


def _describe(tensor: TensorSpec) -> dict[str, Any]:
    described: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape}
    if tensor.nullable:
        described["parameters"] = {"nullable": True}
    return described


def _load(body: bytes) -> dict[str, Any]:
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        rest = error.doc[error.pos :].lstrip("-")
        if rest.startswith(("NaN", "Infinity", "inf", "nan")):
            raise BadRequest(
                f"the body holds {rest[:8].split(',')[0].rstrip('] }')!r} at character {error.pos}, which JSON does not "
                "have; send null for a missing value where the model's metadata says nullable"
            ) from None
        raise BadRequest(f"the body is not JSON in UTF-8: {error.msg} at character {error.pos}") from None
    if type(document) is not dict:
        raise BadRequest("the body is not a JSON object; send {'inputs': [{name, shape, datatype, data}, ...]}")
    return document


def _read_inputs(inputs: list[dict[str, Any]], signature: Signature, may_hold_bool: bool) -> dict[str, Array]:
    specs = {tensor.name: tensor for tensor in signature.inputs}
    found: dict[str, Array] = {}
    for entry in inputs:
        name = entry.get("name")
        spec = specs.get(name) if type(name) is str else None
        if spec is None:
            raise BadRequest(f"unknown input {short(name)}; the model takes {', '.join(map(repr, specs))}")
        if spec.name in found:
            raise BadRequest(f"input {spec.name!r} is given twice; send each input once")
        _check_parameters(entry.get("parameters"), f"input {spec.name!r}")
        if entry.get("datatype") != spec.datatype:
            raise BadRequest(
                f"input {spec.name!r}: datatype {short(entry.get('datatype'))} is not the model's {spec.datatype}"
            )
        shape = check_shape(spec, entry.get("shape"))
        if signature.is_batched and shape[0] == 0:
            raise BadRequest(f"input {spec.name!r}: shape {list(shape)} has no rows; send at least one")
        found[spec.name] = read_json(spec, shape, entry.get("data"), may_hold_bool=may_hold_bool)
    missing = [name for name in specs if name not in found]
    if missing:
        raise BadRequest(
            f"missing input {', '.join(map(repr, missing))}; the model takes {', '.join(map(repr, specs))}"
        )
    return {name: found[name] for name in specs}  # one order, so that requests can be merged


def _read_outputs(outputs: list[dict[str, Any]] | None, signature: Signature) -> tuple[str, ...]:
    known = {tensor.name: tensor for tensor in signature.outputs}
    if outputs is None or not outputs:
        names = list(known)
    else:
        names = []
        for entry in outputs:
            name = entry.get("name")
            if type(name) is not str or name not in known:
                raise BadRequest(f"unknown output {short(name)}; the model gives {', '.join(map(repr, known))}")
            if name in names:
                raise BadRequest(f"output {name!r} is asked for twice; ask for each output once")
            _check_parameters(entry.get("parameters"), f"output {name!r}")
            names.append(name)
    for name in names:
        if known[name].datatype in BINARY_ONLY:
            raise BadRequest(
                f"output {name!r} is {known[name].datatype}, which has no JSON form; ask for other outputs"
            )
    return tuple(names)


def _num_rows(tensors: Mapping[str, Array], signature: Signature) -> int:
    if not signature.is_batched:
        return 1
    rows = {name: int(array.shape[0]) for name, array in tensors.items()}
    if len(set(rows.values())) != 1:
        counts = ", ".join(f"{name!r} has {count}" for name, count in rows.items())
        raise BadRequest(f"the inputs differ in their number of rows: {counts}; send the same number in each")
    return next(iter(rows.values()))


def _read_id(document: dict[str, Any]) -> str | None:
    given = document.get("id")
    if given is None:
        return None
    if type(given) is not str or len(given) > MAX_ID_CHARS:
        raise BadRequest(f"id {short(given)} is not a string of at most {MAX_ID_CHARS} characters")
    return given


def _list_of_objects(document: dict[str, Any], key: str) -> list[dict[str, Any]] | None:
    value = document.get(key)
    if value is None:
        return None
    if type(value) is not list or not all(type(entry) is dict for entry in value):
        raise BadRequest(f"{key} is not a list of objects")
    return value


def _check_parameters(parameters: Any, where: str) -> None:
    if parameters is None:
        return
    if type(parameters) is not dict:
        raise BadRequest(f"parameters of {where} is not an object")
    for name, value in parameters.items():
        if type(value) not in (str, int, float, bool):
            raise BadRequest(f"parameter {name!r} of {where} is not a string, number or boolean")
        if name in _REFUSED_PARAMETERS and value:
            raise BadRequest(f"parameter {name!r} of {where}: {_REFUSED_PARAMETERS[name]}")
