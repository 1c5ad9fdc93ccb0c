"""Finds the axes of a padded dimension in the graph from the user's options. Each load verifies the padding."""

from collections.abc import Iterable, Mapping

from onnx import ModelProto, ValueInfoProto

from maas_ray.bundle.format import PaddedAxis, Signature
from maas_ray.errors import SpecError


def padded_axis(
    model: ModelProto, signature: Signature, pad: str, values: Mapping[str, float | str] | None = None
) -> PaddedAxis:
    """Finds a dimension by its name.

    Args:
        model: model whose inputs and outputs name their variable dimensions.
        signature: signature of the model.
        pad: `DIMENSION=MASK`, for instance `seq=attention_mask`.
        values: padding values of inputs.

    Raises:
        SpecError: there is no such dimension or mask, or a padded input does not have the dimension.
    """
    name, _, mask = pad.partition("=")
    if not name or not mask:
        raise SpecError(f"--pad {pad!r} is not of the form DIMENSION=MASK, such as seq=attention_mask")
    known = {tensor.name for tensor in (*signature.required, *signature.outputs)}
    inputs = _places(model.graph.input, name, known)
    outputs = _places(model.graph.output, name, known)
    if mask not in inputs:
        raise SpecError(
            f"--pad {pad}: {mask!r} is not an input with the dimension {name!r} after the rows; inputs with it: "
            f"{', '.join(map(repr, inputs)) or 'none'}"
        )
    if wrong := [each for each in values or {} if each not in inputs]:
        raise SpecError(
            f"--pad-value {wrong[0]}: the input does not have the dimension {name!r}; padded inputs: {sorted(inputs)}"
        )
    return PaddedAxis(name=name, mask=mask, inputs=inputs, outputs=outputs, values=dict(values or {}))


def read_pad_values(given: Iterable[str]) -> dict[str, float | str]:
    """Parses `NAME=VALUE` pairs of the command line; numeric values become numbers.

    Raises:
        SpecError: a pair has another form.
    """
    found: dict[str, float | str] = {}
    for each in given:
        name, separator, text = each.partition("=")
        if not separator or not name:
            raise SpecError(f"--pad-value {each!r} is not of the form NAME=VALUE, such as input_ids=1")
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
                    f"--pad {name}: {value.name!r} has the dimension more than once, so it cannot be padded"
                )
            found[value.name] = names.index(name)
    return found
