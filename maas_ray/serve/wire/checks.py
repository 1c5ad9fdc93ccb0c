"""Validation of requests in any wire format: names, datatypes, rows and ids.

Signatures are passed as tables by name, so that a reader of many requests builds them once.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BadRequest
from maas_ray.serve.wire.classification import can_classify
from maas_ray.serve.wire.parameters import output_parameters
from maas_ray.serve.wire.tensors import BINARY_ONLY, short

MAX_ID_CHARS = 256


class WantedOutput(NamedTuple):
    """One requested output."""

    name: str
    is_binary: bool
    classes: int = 0
    """Number of classes of each row that are requested instead of the tensor; 0 for the tensor."""


@dataclass(slots=True)  # not frozen: that would add a microsecond per request
class InferRequest:
    """A validated request: its tensors match the signature."""

    id: str | None
    inputs: dict[str, Array]
    """Inputs in the signature's order, so that requests can be merged."""
    outputs: tuple[WantedOutput, ...]
    """Requested outputs, in the order of the response."""
    num_rows: int
    """Size of the batch dimension as parsed; 1 for a model without one."""
    timeout_us: int | None = None
    """Timeout set by the client, in microseconds; None if not set."""
    priority: int = 0
    """1 is the highest; 0 is the default."""
    encoded: tuple[str, ...] = ()
    """Inputs whose elements must still be decoded: image files or texts."""
    is_plain: bool = True
    """Whether each input was sent in the datatype of the graph."""


def known_input(name: Any, specs: Mapping[str, TensorSpec], found: Mapping[str, Array]) -> TensorSpec:
    """Returns the input of this name.

    Raises:
        BadRequest: there is none, or it was already found.
    """
    spec = specs.get(name) if type(name) is str else None
    if spec is None:
        raise BadRequest(f"unknown input {short(name)}; the model's inputs are {', '.join(map(repr, specs))}")
    if name in found:
        raise BadRequest(f"input {name!r} occurs twice; send each input once")
    return spec


def complete_inputs(found: dict[str, Array], specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    """Returns the inputs in the signature's order, so that requests can be merged.

    Raises:
        BadRequest: an input is missing.
    """
    if len(found) != len(specs):
        absent = [name for name in specs if name not in found]
        if missing := [name for name in absent if not specs[name].optional]:
            shown = ", ".join(map(repr, missing))
            raise BadRequest(f"missing input {shown}; the model's inputs are {', '.join(map(repr, specs))}")
        return {name: found[name] for name in specs if name in found}
    return found if len(found) == 1 else {name: found[name] for name in specs}


def num_rows(tensors: Mapping[str, Array], signature: Signature) -> int:
    """Returns the rows of a request as parsed, from its mandatory inputs; 1 for a model without a batch dimension.

    Raises:
        BadRequest: the inputs have different numbers of rows, or none.
    """
    if not signature.is_batched:
        return 1
    return count_rows({tensor.name: tensors[tensor.name] for tensor in signature.required})


def count_rows(tensors: Mapping[str, Array]) -> int:
    """Returns the size of the first dimension of all tensors; raises as `num_rows`."""
    counts = {array.shape[0] for array in tensors.values()}
    if len(counts) != 1:
        shown = ", ".join(f"{name!r} has {array.shape[0]}" for name, array in tensors.items())
        raise BadRequest(f"the inputs have different numbers of rows: {shown}; send the same number in each")
    count = counts.pop()
    if count == 0:
        raise BadRequest(f"input {next(iter(tensors))!r} has no rows; send at least one")
    return int(count)


def check_id(given: Any) -> str | None:
    """Returns the id of a request, if it has one.

    Raises:
        BadRequest: not a string, or too long to be sent back.
    """
    if given is not None and (type(given) is not str or len(given) > MAX_ID_CHARS):
        raise BadRequest(f"id {short(given)} is not a string of at most {MAX_ID_CHARS} characters")
    return given


def wanted_outputs(
    entries: Iterable[tuple[Any, Any]], specs: Mapping[str, TensorSpec], *, is_binary: bool
) -> tuple[WantedOutput, ...]:
    """Returns the outputs of the response: all outputs, unless some are requested by name.

    Args:
        entries: name and parameters of each requested output.
        specs: outputs of the model.
        is_binary: default format of the outputs.

    Raises:
        BadRequest: an output that the model does not have or that is requested twice, unsupported parameters,
            classes of an output without classes, or a datatype without a JSON form.
    """
    wanted: dict[str, WantedOutput] = {}
    for name, parameters in entries:
        spec = specs.get(name) if type(name) is str else None
        if spec is None:
            raise BadRequest(f"unknown output {short(name)}; the model's outputs are {', '.join(map(repr, specs))}")
        if name in wanted:
            raise BadRequest(f"output {name!r} is requested twice; request each output once")
        form, classes = output_parameters(parameters, name, is_binary)
        if classes and not can_classify(spec.datatype):
            raise BadRequest(f"output {name!r} is {spec.datatype}, which has no classes; omit classification")
        wanted[name] = WantedOutput(name, form, classes)
    outputs = tuple(wanted.values()) or tuple(WantedOutput(name, is_binary) for name in specs)
    for output in outputs:
        datatype = specs[output.name].datatype
        if datatype in BINARY_ONLY and not (output.is_binary or output.classes):
            raise BadRequest(
                f"output {output.name!r} is {datatype}, which has no JSON form; request binary_data or other outputs"
            )
    return outputs
