"""What a request must fulfil whatever the wire: its names, its datatypes, its rows and its id. Reads no bytes.

The names of a signature come as tables by name, so that whoever reads many requests makes them once.
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
    """One output that the caller asked for."""

    name: str
    is_binary: bool
    classes: int = 0
    """How many classes of each row are wanted instead of the tensor; 0 for the tensor."""


@dataclass(slots=True)  # not frozen: that makes each request a microsecond dearer
class InferRequest:
    """A checked request: tensors fit the signature."""

    id: str | None
    inputs: dict[str, Array]
    """In the signature's order, so that requests can be merged."""
    outputs: tuple[WantedOutput, ...]
    """In the order in which they are answered."""
    num_rows: int
    """Size of the batch dimension as parsed; 1 for a model without one."""
    timeout_us: int | None = None
    """Time that the caller allows, in microseconds; None if he does not say."""
    priority: int = 0
    """1 is the highest; 0 is the default one."""


def known_input(name: Any, specs: Mapping[str, TensorSpec], found: Mapping[str, Array]) -> TensorSpec:
    """The input of that name.

    Raises:
        BadRequest: there is none, or it was found already.
    """
    spec = specs.get(name) if type(name) is str else None
    if spec is None:
        raise BadRequest(f"unknown input {short(name)}; the model takes {', '.join(map(repr, specs))}")
    if name in found:
        raise BadRequest(f"input {name!r} is given twice; send each input once")
    return spec


def check_datatype(spec: TensorSpec, datatype: Any) -> None:
    """Raises `BadRequest` unless an input has the datatype of the signature."""
    if datatype != spec.datatype:
        raise BadRequest(f"input {spec.name!r}: datatype {short(datatype)} is not the model's {spec.datatype}")


def complete_inputs(found: dict[str, Array], specs: Mapping[str, TensorSpec]) -> dict[str, Array]:
    """The inputs in one order, so that requests can be merged.

    Raises:
        BadRequest: one is missing.
    """
    if len(found) != len(specs):
        absent = [name for name in specs if name not in found]
        if missing := [name for name in absent if not specs[name].optional]:
            shown = ", ".join(map(repr, missing))
            raise BadRequest(f"missing input {shown}; the model takes {', '.join(map(repr, specs))}")
        return {name: found[name] for name in specs if name in found}
    return found if len(found) == 1 else {name: found[name] for name in specs}


def num_rows(tensors: Mapping[str, Array], signature: Signature) -> int:
    """Rows of a request as parsed, in the inputs that every request has; 1 for a model without a batch dimension.

    Raises:
        BadRequest: the inputs differ, or have none.
    """
    if not signature.is_batched:
        return 1
    return count_rows({tensor.name: tensors[tensor.name] for tensor in signature.required})


def count_rows(tensors: Mapping[str, Array]) -> int:
    """Size of the first dimension of every tensor; raises as `num_rows`."""
    counts = {array.shape[0] for array in tensors.values()}
    if len(counts) != 1:
        shown = ", ".join(f"{name!r} has {array.shape[0]}" for name, array in tensors.items())
        raise BadRequest(f"the inputs differ in their number of rows: {shown}; send the same number in each")
    count = counts.pop()
    if count == 0:
        raise BadRequest(f"input {next(iter(tensors))!r} has no rows; send at least one")
    return int(count)


def check_id(given: Any) -> str | None:
    """The id of a request, if it has one.

    Raises:
        BadRequest: not a string, or too long to be sent back.
    """
    if given is not None and (type(given) is not str or len(given) > MAX_ID_CHARS):
        raise BadRequest(f"id {short(given)} is not a string of at most {MAX_ID_CHARS} characters")
    return given


def wanted_outputs(
    entries: Iterable[tuple[Any, Any]], specs: Mapping[str, TensorSpec], *, is_binary: bool
) -> tuple[WantedOutput, ...]:
    """What is to be answered: every output, unless some are named.

    Args:
        entries: name and parameters of each output that was asked for.
        specs: the outputs of the model.
        is_binary: the form of outputs that say nothing else.

    Raises:
        BadRequest: an output that the model does not have or that is asked for twice, parameters that are not
            offered, classes of something that has none, or a datatype without a JSON form.
    """
    wanted: dict[str, WantedOutput] = {}
    for name, parameters in entries:
        spec = specs.get(name) if type(name) is str else None
        if spec is None:
            raise BadRequest(f"unknown output {short(name)}; the model gives {', '.join(map(repr, specs))}")
        if name in wanted:
            raise BadRequest(f"output {name!r} is asked for twice; ask for each output once")
        form, classes = output_parameters(parameters, name, is_binary)
        if classes and not can_classify(spec.datatype):
            raise BadRequest(f"output {name!r} is {spec.datatype}, which has no classes; leave out classification")
        wanted[name] = WantedOutput(name, form, classes)
    outputs = tuple(wanted.values()) or tuple(WantedOutput(name, is_binary) for name in specs)
    for output in outputs:
        datatype = specs[output.name].datatype
        if datatype in BINARY_ONLY and not (output.is_binary or output.classes):
            raise BadRequest(
                f"output {output.name!r} is {datatype}, which has no JSON form; ask for it with binary_data, or for others"
            )
    return outputs
