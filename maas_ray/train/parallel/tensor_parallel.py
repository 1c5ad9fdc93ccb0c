"""Tensor parallelism: splits the layers that a plan names over the `tp` ranks, and refuses a plan that does not fit."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from maas_ray.errors import ModelError
from maas_ray.train.modules.dropout import SampleDropout, running_of
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.spec.parallelism import MeshLayout

STYLES = (
    "colwise", "colwise_gather_output", "colwise_rep", "rowwise", "embedding_rowwise", "sequence_parallel",
)  # fmt: skip
"""The supported styles of a plan; `colwise_rep` is an older name of `colwise_gather_output`."""


def check_plan(net: nn.Module, plan: Mapping[str, str], layout: MeshLayout) -> None:
    """Refuses a plan that does not match the model."""
    if not plan:
        raise ModelError(
            f"parallelism.tp: {type(net).__name__} has no tensor-parallel plan; add the attribute `tp_plan` to it, set "
            "parallelism.tp_plan in the spec (layer name to colwise or rowwise), or use dp_shard"
        )
    named = [(name, module, _style_of(name, plan)) for name, module in net.named_modules()]
    if all(style in (None, "sequence_parallel") for _, _, style in named):
        raise ModelError(
            f"parallelism.tp: no layer of {type(net).__name__} matches its plan ({', '.join(plan)}); its layers: "
            f"{', '.join(name for name, module, _ in named if isinstance(module, nn.Linear | nn.Embedding))}"
        )
    for name, module, style in named:
        if style is not None:
            _check_layer(name, module, style, layout.tp)
    if layout.sequence_parallel and all(style != "sequence_parallel" for _, _, style in named):
        raise ModelError(
            f"parallelism.sequence_parallel: the plan of {type(net).__name__} has no layer with the style "
            "sequence_parallel; set it to false"
        )
    for what, number in getattr(net, "tp_sizes", {}).items():
        if number % layout.tp:
            raise ModelError(
                f"parallelism.tp: the model has {number} {what}, which {layout.tp} ranks cannot share equally"
            )


def cut_layers(part: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str], sequence_parallel: bool) -> None:
    """Tensor parallelism: distributes each layer in the plan over the `tp` ranks."""
    tied = _tied_names(part)
    for name, _ in list(part.named_modules()):
        style = _style_of(name, plan)
        if style is None or (style == "sequence_parallel" and not sequence_parallel):
            continue
        if not any(True for _ in part.get_submodule(name).parameters()):
            continue  # it belongs to another stage
        # Every rank has built the same weights: no communication is needed.
        parallelize_module(part.get_submodule(name), mesh, _style(style, sequence_parallel), src_data_rank=None)
    _tie_again(part, tied)


def tell_dropouts(net: nn.Module, coordinates: RankCoordinates, plan: Mapping[str, str]) -> None:
    """Sets the part of the activations of each dropout layer. On the whole model: stages can start at any layer."""
    is_cut = False  # whether the activations at this point of the model are split along their features
    for name, module in net.named_modules():
        style = _style_of(name, plan)
        if style in ("colwise", "rowwise"):
            is_cut = style == "colwise"
        elif style is None and isinstance(module, SampleDropout) and (is_cut or coordinates.layout.sequence_parallel):
            module.shard = (-1 if is_cut else 1, coordinates.tp, coordinates.layout.tp)
        running = running_of(module)
        if running is not None and any(_style_of(f"{name}.{child}", plan) == "colwise" for child, _ in module.named_children()):  # fmt: skip
            running.shard = (1, coordinates.tp, coordinates.layout.tp)  # attention: [N, heads, T, T]


def _style_of(name: str, plan: Mapping[str, str]) -> str | None:
    parts = name.split(".")
    for pattern, style in plan.items():
        wanted = pattern.split(".")
        if len(wanted) == len(parts) and all(fnmatch(part, want) for part, want in zip(parts, wanted, strict=True)):
            return style
    return None


def _style(style: str, sequence_parallel: bool) -> ParallelStyle:
    # Between the split layers, activations are complete on each rank, or split along the sequence.
    between = Shard(1) if sequence_parallel else Replicate()
    if style == "colwise":
        return ColwiseParallel(input_layouts=between)
    if style in ("colwise_gather_output", "colwise_rep"):
        return ColwiseParallel(input_layouts=between, output_layouts=Replicate())
    if style == "rowwise":
        return RowwiseParallel(output_layouts=between)
    if style == "embedding_rowwise":
        return RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    return SequenceParallel(use_local_output=True)


def _check_layer(name: str, module: nn.Module, style: str, size: int) -> None:
    if style not in STYLES:
        raise ModelError(f"parallelism.tp: the plan gives {name} the style {style!r}; use one of {', '.join(STYLES)}")
    if style == "sequence_parallel":
        return
    if isinstance(module, nn.Linear):
        length, what = (module.in_features, "inputs") if style == "rowwise" else (module.out_features, "outputs")
    elif isinstance(module, nn.Embedding):
        length, what = module.num_embeddings, "rows"
    else:
        raise ModelError(
            f"parallelism.tp: {name} is a {type(module).__name__}; only Linear and Embedding can be {style}"
        )
    if length % size:
        raise ModelError(
            f"parallelism.tp: {name} has {length} {what}, which {size} ranks cannot share equally; use a divisor of "
            f"{length}"
        )


def _tied_names(part: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in part.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [shared for shared in names.values() if len(shared) > 1]


def _tie_again(part: nn.Module, tied: Sequence[Sequence[str]]) -> None:
    for first, *others in tied:
        kept = part.get_parameter(first)
        for name in others:
            owner, _, key = name.rpartition(".")
            other = part.get_parameter(name)
            if isinstance(kept, DTensor) != isinstance(other, DTensor) or (
                isinstance(kept, DTensor) and isinstance(other, DTensor) and kept.placements != other.placements
            ):
                raise ModelError(
                    f"parallelism.tp: {first} and {name} are the same weight, but the plan splits them differently"
                )
            setattr(part.get_submodule(owner), key, kept)
