"""Determines the batch dimension, by name, statement or graph, and whether requests may share a run."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from onnx import ModelProto, TensorProto, ValueInfoProto

from maas_ray.bundle.axis.sizes import BATCH, ONE, Size
from maas_ray.bundle.axis.values import Mixed, Value
from maas_ray.bundle.axis.walk import Walk
from maas_ray.bundle.datatypes import ONNX
from maas_ray.bundle.format import BatchAxis, Signature, TensorSpec

_BATCH = re.compile(r".*batch.*|bs|bsz|b", re.IGNORECASE)
"""Names that identify the batch dimension."""
_COUNT = re.compile(r"n|(num_|n_)?(rows|samples|examples|instances|records|items|inputs)", re.IGNORECASE)
"""Names of counts that may or may not be the rows of a batch: the graph decides."""
_GENERATED = re.compile(
    r"|\?|-1|None|unk__\d+|unknown_?\d*|sym\d*|s\d+|dim_?\d+|.*_dim_0|.*dynamic_axes_\d+|.*DynamicDimension\.\d+|.*__0"
)
"""Default names of exporters for unnamed dimensions: the graph decides."""

_TYPES = {datatype: kind for kind, datatype in ONNX.items()}


@dataclass(frozen=True)
class Verdict:
    """The result of a graph's analysis."""

    reason: str = ""
    """Reason why rows of several requests must not share a run; empty if they may."""
    is_across: bool = False
    """Whether the graph is known to compute across rows; otherwise it is not known to compute rows independently."""

    @property
    def keeps_apart(self) -> bool:
        """Whether every output of a row depends on that row alone."""
        return not self.reason


def analyze(model: ModelProto, signature: Signature) -> Verdict:
    """Follows the first dimension of all inputs through a graph.

    Args:
        model: a model that was inspected.
        signature: a signature whose inputs and outputs all begin with a variable size.
    """
    declared = {value.name: value for value in model.graph.input}
    names = _first_names(model, signature.required)
    for tensor in signature.required:
        inner = {dim.dim_param for dim in list(declared[tensor.name].type.tensor_type.shape.dim)[1:]} - {""}
        if twice := inner & {name for name in names if name}:
            return Verdict(f"input {tensor.name!r} has the dimension {twice.pop()!r} more than once", is_across=True)
    walk = Walk(model)
    outputs = walk.run(model.graph, {tensor.name: _value(tensor) for tensor in signature.required})
    known = {output.name: found for output, found in zip(model.graph.output, outputs, strict=True)}
    for tensor in signature.outputs:
        found = known[tensor.name]
        if isinstance(found, Mixed):
            return Verdict(found.reason, found.is_across)
        if found.is_position or found.by_place:
            return Verdict(f"output {tensor.name!r} contains the index of a row in the run", is_across=True)
        if found.axis != 0 or found.inner != ONE or found.sizes[0] != BATCH:
            return Verdict(
                f"output {tensor.name!r} does not have one entry per row in its first dimension", is_across=True
            )
    return Verdict()


def judge(signature: Signature, model: ModelProto, batch_axis: str | None = None) -> tuple[Signature, Verdict]:
    """Determines the batch dimension, if the signature does not state it, and analyzes the graph along it.

    Args:
        signature: signature of the graph; an existing statement is kept.
        model: a model that was inspected.
        batch_axis: the user's statement: `none`, the name of a dimension, or `first` for one without a name.

    Returns:
        The signature with its statement, and whether requests may share a run.

    Raises:
        ValueError: the stated dimension is not the first one of every input; the message lists the first dimensions.
    """
    tensors = (*signature.required, *signature.outputs)
    fixed = next((tensor for tensor in tensors if not tensor.shape or tensor.shape[0] != -1), None)
    if batch_axis is not None and batch_axis.lower() != "none":
        _check_stated(batch_axis, signature, model, fixed)
        stated = BatchAxis(name=batch_axis, origin="user")
        signature = signature.model_copy(update={"batch": stated})
    elif batch_axis is not None:
        signature = signature.model_copy(update={"batch": BatchAxis(name=None, origin="user")})
    if fixed is not None:
        what = "input" if fixed in signature.required else "output"
        begins = f"begins with the fixed size {fixed.shape[0]}" if fixed.shape else "is a scalar"
        verdict = Verdict(f"{what} {fixed.name!r} {begins}, so there is no batch dimension")
        return _stated(signature, BatchAxis(name=None, origin="graph")), verdict
    if signature.batch is not None:
        if signature.batch.name is None:
            whose = {"user": "the user has", "graph": "its graph has", "exporter": "its exporter has"}
            return signature, Verdict(f"{whose[signature.batch.origin]} stated that it has no batch dimension")
        return signature, analyze(model, signature)
    return _by_name(signature, model)


def _by_name(signature: Signature, model: ModelProto) -> tuple[Signature, Verdict]:
    names = sorted(_first_names(model, signature.required))
    given = [name for name in names if not _GENERATED.fullmatch(name)]
    none = BatchAxis(name=None, origin="graph")
    foreign = [name for name in given if not _BATCH.fullmatch(name) and not _COUNT.fullmatch(name)]
    if foreign:
        return _stated(signature, none), Verdict(
            f"the first dimension is named {foreign[0]!r}, which does not identify a batch; if it is the batch "
            f"dimension, import with --batch-axis {foreign[0]}"
        )
    if len(given) > 1:
        return _stated(signature, none), Verdict(f"the inputs begin with different dimensions ({', '.join(given)})")
    verdict = analyze(model, signature)
    # A name alone is sufficient only if it says "batch"; otherwise a graph that computes across rows has no batch.
    is_named = bool(given) and _BATCH.fullmatch(given[0]) is not None
    is_batch = is_named or verdict.keeps_apart or not verdict.is_across
    name = (given or ["first"])[0] if is_batch else None
    return _stated(signature, BatchAxis(name=name, origin="graph")), verdict


def _stated(signature: Signature, batch: BatchAxis) -> Signature:
    return signature if signature.batch is not None else signature.model_copy(update={"batch": batch})


def _check_stated(name: str, signature: Signature, model: ModelProto, fixed: TensorSpec | None) -> None:
    found = _first_names(model, signature.required)
    shown = ", ".join(repr(each or "(without a name)") for each in sorted(found))
    if fixed is not None:
        raise ValueError(
            f"{fixed.name!r} has the shape {list(fixed.shape)}, so {name!r} is not the first dimension of every input and "
            "output; export the model with a variable batch dimension"
        )
    if name != "first" and found != {name}:
        raise ValueError(
            f"the inputs begin with the dimensions {shown}, not with {name!r}; give one of these names, or 'first' for "
            "a dimension without a name"
        )


def _first_names(model: ModelProto, inputs: Iterable[TensorSpec]) -> set[str]:
    """The names of the first dimensions; an empty name for a dimension without one."""
    values = {value.name: value for value in model.graph.input}
    return {_first_name(values[tensor.name]) for tensor in inputs}


def _first_name(value: ValueInfoProto) -> str:
    dims = value.type.tensor_type.shape.dim
    return dims[0].dim_param if dims else ""


def _value(tensor: TensorSpec) -> Value:
    rest = [
        Size(1, (f"{tensor.name} {axis}",)) if size == -1 else Size(size)
        for axis, size in enumerate(tensor.shape)
        if axis
    ]
    return Value((BATCH, *rest), 0, dtype=_TYPES.get(tensor.datatype, TensorProto.UNDEFINED))
