"""Request parameters: reserved ones are applied, or refused with the reason.

Sources: triton-inference-server/server, docs/protocol/extension_{parameters,schedule_policy,classification,
binary_data,sequence,shared_memory}.md. Any other string, number or boolean is accepted and has no effect.
"""

from typing import Any, NamedTuple

from maas_ray.errors import BadRequest, NotOffered
from maas_ray.serve.wire.tensors import short

_NO_SEQUENCES = "stateful sequences are not supported"
_NO_SHARED_MEMORY = "the shared memory extension is not supported; send the data in the request"
_NOT_OFFERED = {
    "sequence_id": _NO_SEQUENCES,
    "sequence_start": _NO_SEQUENCES,
    "sequence_end": _NO_SEQUENCES,
    "shared_memory_region": _NO_SHARED_MEMORY,
    "shared_memory_byte_size": _NO_SHARED_MEMORY,
    "shared_memory_offset": _NO_SHARED_MEMORY,
}
_MAX_INT = (1 << 63) - 1


class RequestParameters(NamedTuple):
    """Parameters of the whole request."""

    priority: int = 0
    """1 is the highest; 0 is the default."""
    timeout_us: int | None = None
    is_binary: bool = False
    """Whether binary data is the default format of the outputs."""


class OutputParameters(NamedTuple):
    """Parameters of one requested output."""

    is_binary: bool
    classes: int = 0
    """Number of classes of each row; 0 for the tensor itself."""


_PLAIN = RequestParameters()


def request_parameters(parameters: Any) -> RequestParameters:
    """Parses the parameters of the request.

    Raises:
        BadRequest: not an object, a value of the wrong type, or a parameter that is not supported.
    """
    if parameters is None:
        return _PLAIN
    where = "the request"
    check_parameters(parameters, where)
    return RequestParameters(
        priority=_integer(parameters, "priority", where),
        timeout_us=_integer(parameters, "timeout", where) or None,
        is_binary=_flag(parameters, "binary_data_output", where, False),
    )


def input_size(parameters: Any, name: str) -> int | None:
    """Returns `binary_data_size` of an input, or None if its data is JSON.

    Raises:
        BadRequest: as `request_parameters`.
    """
    if parameters is None:
        return None
    where = f"input {name!r}"
    check_parameters(parameters, where)
    return _integer(parameters, "binary_data_size", where) if parameters.get("binary_data_size") is not None else None


def output_parameters(parameters: Any, name: str, is_binary: bool) -> OutputParameters:
    """Parses the parameters of a requested output; `is_binary` is the request's default.

    Raises:
        BadRequest: as `request_parameters`.
    """
    if parameters is None:
        return OutputParameters(is_binary)
    where = f"output {name!r}"
    check_parameters(parameters, where)
    return OutputParameters(
        is_binary=_flag(parameters, "binary_data", where, is_binary),
        classes=_integer(parameters, "classification", where),
    )


def check_parameters(parameters: Any, where: str) -> None:
    """Refuses parameters that are not an object of plain values, and those that are not supported.

    Raises:
        BadRequest: not such an object, or a reserved name.
        NotOffered: a parameter of sequences or of shared memory.
    """
    if type(parameters) is not dict:
        raise BadRequest(f"parameters of {where} is not an object")
    for name, value in parameters.items():
        if value is not None and type(value) not in (str, int, float, bool):
            raise BadRequest(f"parameter {short(name)} of {where} is not a string, number or boolean")
        if not value:
            continue
        if name in _NOT_OFFERED:
            raise NotOffered(f"parameter {short(name)} of {where}: {_NOT_OFFERED[name]}")
        if name == "headers" or name.startswith("triton_"):
            raise BadRequest(
                f"parameter {short(name)} of {where}: the name is reserved by the protocol; use another name"
            )


def _integer(parameters: dict[str, Any], name: str, where: str) -> int:
    value = parameters.get(name)
    if value is None:  # treated as missing: some clients send every parameter that they know
        return 0
    if type(value) is float and value.is_integer() and value <= _MAX_INT:
        value = int(value)
    if type(value) is not int or not 0 <= value <= _MAX_INT:
        raise BadRequest(f"parameter {name!r} of {where} is {short(value)}, not a non-negative integer of 64 bits")
    return value


def _flag(parameters: dict[str, Any], name: str, where: str, default: bool) -> bool:
    value = parameters.get(name)
    if value is None:
        return default
    if type(value) in (int, float) and value in (0, 1):
        value = bool(value)
    if type(value) is not bool:
        raise BadRequest(f"parameter {name!r} of {where} is {short(value)}, not true or false")
    return value
