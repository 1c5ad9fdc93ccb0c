"""From what a user says on padding to the places of the dimension in the graph. Proves nothing: each load does."""

from collections.abc import Iterable, Mapping

from onnx import ModelProto, ValueInfoProto

from maas_ray.bundle.format import PaddedAxis, Signature
from maas_ray.errors import SpecError


def padded_axis(
    model: ModelProto, signature: Signature, pad: str, values: Mapping[str, float | str] | None = None
) -> PaddedAxis:
    """Finds a dimension by its name.

    Args:
        model: whose inputs and outputs name their variable dimensions.
        signature: of the model.
        pad: `DIMENSION=MASK`, for instance `seq=attention_mask`.
        values: what inputs are padded with.

    Raises:
        SpecError: there is no such dimension or mask, or an input that is padded does not have the dimension.
    """
    name, _, mask = pad.partition("=")
    if not name or not mask:
        raise SpecError(f"--pad {pad!r} is not DIMENSION=MASK, for instance seq=attention_mask")
    known = {tensor.name for tensor in (*signature.required, *signature.outputs)}
    inputs = _places(model.graph.input, name, known)
    outputs = _places(model.graph.output, name, known)
    if mask not in inputs:
        raise SpecError(
            f"--pad {pad}: {mask!r} is not an input with the dimension {name!r} beyond the rows; those are "
            f"{', '.join(map(repr, inputs)) or 'none'}"
        )
    if wrong := [each for each in values or {} if each not in inputs]:
        raise SpecError(
            f"--pad-value {wrong[0]}: that input does not have the dimension {name!r}; padded are {sorted(inputs)}"
        )
    return PaddedAxis(name=name, mask=mask, inputs=inputs, outputs=outputs, values=dict(values or {}))


def read_pad_values(given: Iterable[str]) -> dict[str, float | str]:
    """`NAME=VALUE` pairs as a command gives them; a value that is a number is one.

    Raises:
        SpecError: one has another form.
    """
    found: dict[str, float | str] = {}
    for each in given:
        name, separator, text = each.partition("=")
        if not separator or not name:
            raise SpecError(f"--pad-value {each!r} is not NAME=VALUE, for instance input_ids=1")
        try:
            found[name] = float(text)
        except ValueError:
            found[name] = text
    return found


def _places(values: Iterable[ValueInfoProto], name: str, known: set[str]) -> dict[str, int]:
    found = {}
    for value in values:
        names = [dim.dim_param for dim in value.type.tensor_type.shape.dim]
        if value.name in known and name in names[1:]:
            if names.count(name) > 1:
                raise SpecError(
                    f"--pad {name}: {value.name!r} has that dimension more than once, so it cannot be padded"
                )
            found[value.name] = names.index(name)
    return found
