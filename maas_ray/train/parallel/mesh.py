"""Splits a whole model into the part of one rank: pipeline stages, tensor-parallel layers, shards or replicas.

Uses only torch's own parallelism, in the order in which it composes: pipeline stages, layers split by the plan
(DTensor), then shards or replicas (FSDP2 or DistributedDataParallel), all on one device mesh. NCCL on GPUs, gloo on
CPUs; untested on GPUs.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from maas_ray.errors import ModelError, ResourcesMissing
from maas_ray.train.modules.blocks import Forward, neighbours, replace_forward
from maas_ray.train.modules.dropout import SampleDropout, running_of
from maas_ray.train.parallel.pipeline import split_layers
from maas_ray.train.spec.parallelism import AXES, MeshLayout

STYLES = (
    "colwise", "colwise_gather_output", "colwise_rep", "rowwise", "embedding_rowwise", "sequence_parallel",
)  # fmt: skip
"""The supported styles of a plan; `colwise_rep` is an older name of `colwise_gather_output`."""


@dataclass(frozen=True)
class RankCoordinates:
    """The position of a rank in the mesh."""

    layout: MeshLayout
    mesh: DeviceMesh | None
    """Mesh of the axes that the layout uses; None in a single process."""
    pp: int = 0
    dp: int = 0
    """Index of its share of the rows, in [0, layout.dp)."""
    tp: int = 0


@dataclass(frozen=True)
class Parts:
    """The parts of the model that a rank trains.

    Attributes:
        bare: its parts of the model, with the names of the whole model; one, or two with interleaved stages.
        wrapped: the same parts wrapped for data parallelism, to be called.
    """

    bare: list[nn.Module]
    wrapped: list[nn.Module]


def rank_coordinates(layout: MeshLayout, device_type: str) -> RankCoordinates:
    """Creates the mesh of a layout in the default process group. Collective.

    Raises:
        ModelError: the process group and the layout have different numbers of ranks.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world != layout.world:
        raise ModelError(f"the layout {layout} has {layout.world} ranks, but the process group has {world}")
    if world == 1:
        return RankCoordinates(layout, None)
    # A dimension of one rank would get a group too, and each gloo group has a thread that wakes 100 times per second.
    needed = {axis for axis, size in zip(AXES, layout.sizes, strict=True) if size > 1}
    if layout.cuts_model and layout.dp_replicate > 1:
        needed.add("dp_shard")  # replicas of a tensor-parallel or pipelined model are replicas of one shard
    sizes = {axis: size for axis, size in zip(AXES, layout.sizes, strict=True) if axis in needed}
    mesh = init_device_mesh(device_type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    at = dict(zip(sizes, mesh.get_coordinate() or (), strict=True))
    dp = at.get("dp_replicate", 0) * layout.dp_shard + at.get("dp_shard", 0)
    return RankCoordinates(layout, mesh, at.get("pp", 0), dp, at.get("tp", 0))


def refuse_far_groups(layout: MeshLayout, node: str, device: torch.device) -> None:
    """Refuses tensor-parallel groups across nodes: each layer would wait for the network several times. Collective.

    Args:
        layout: layout of all ranks.
        node: node of this rank.
        device: device of this rank.

    Raises:
        ResourcesMissing: on every rank; the message contains the ranks of such a group.
    """
    if layout.tp == 1:
        return
    mine = torch.tensor([int.from_bytes(sha256(node.encode()).digest()[:7], "little")], device=device)
    nodes = [torch.empty_like(mine) for _ in range(layout.world)]
    dist.all_gather(nodes, mine)
    for first in range(0, layout.world, layout.tp):
        found = {int(node) for node in nodes[first : first + layout.tp]}
        if len(found) > 1:
            raise ResourcesMissing(
                f"parallelism.tp: the ranks {first} to {first + layout.tp - 1} share matrix products but are on "
                f"{len(found)} nodes; use nodes with enough GPUs, lower tp, or set parallelism.tp_across_nodes"
            )


def distribute(
    net: nn.Module,
    coordinates: RankCoordinates,
    device: torch.device,
    *,
    plan: Mapping[str, str] | None = None,
    precision: str = "fp32",
    unit_mib: float = 0.0,
    pp_split: Sequence[str] | None = None,
    example: torch.Tensor | None = None,
    has_unused: bool = False,
) -> Parts:
    """Returns this rank's part of a model that every rank has built with the same weights.

    Args:
        net: the whole model, which is taken apart. If it has no data (device `meta`), neither have the parts.
        coordinates: coordinates of this rank.
        device: device of this rank.
        plan: layer name pattern to style; None: the model's `tp_plan`.
        precision: `bf16` makes sharded layers (FSDP2's policy) and pipeline stages compute in bfloat16; gradients are
            summed in float32. An unsplit model needs autocast by the caller.
        unit_mib: smallest size that FSDP2 gathers at once, in MiB.
        pp_split: first layers of the pipeline stages; None: stages of about equal size.
        example: input rows, for splitting a model that is no sequence of layers into stages.
        has_unused: whether a trained weight may get no gradient; replicas then search for those in each step.

    Raises:
        ModelError: the model does not support the layout; the message contains the reason.
    """
    layout, mesh = coordinates.layout, coordinates.mesh
    if mesh is None:
        return Parts([net.to(device)], [net.to(device)])
    # On the whole model, which all ranks have: all of them raise the error, and none waits for another one.
    _refuse_layers(net, layout, plan)
    plan = plan if plan is not None else getattr(net, "tp_plan", None)
    if layout.tp > 1:
        _tell_dropouts(net, coordinates, plan or {})
    stages = [net]
    if layout.pp > 1:
        stages = split_layers(net, layout.num_stages, named=pp_split, example=example, device=device)[
            coordinates.pp :: layout.pp
        ]
    parts = stages if _is_without_data(net) else [stage.to(device) for stage in stages]
    for part in parts:
        if layout.tp > 1:
            _cut_layers(part, mesh["tp"], plan or {}, layout.sequence_parallel)
    if not layout.cuts_model:
        wrapped = DistributedDataParallel(
            parts[0],
            device_ids=[device] if device.type == "cuda" else None,
            process_group=mesh["dp_replicate"].get_group(),
            find_unused_parameters=has_unused,
            gradient_as_bucket_view=True,  # sums are not copied back: saves a tenth of a small step, and their memory
        )
        return Parts(parts, [wrapped])
    for part in parts:
        if layout.dp > 1:
            _shard(part, mesh, layout, precision, unit_mib)
        elif precision == "bf16" and layout.pp > 1:
            replace_forward(part, _in_bf16)
    return Parts(parts, parts)


def refuse_unfit(
    net: nn.Module, layout: MeshLayout, plan: Mapping[str, str] | None = None, *,
    pp_split: Sequence[str] | None = None, example: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """Refuses a model that does not support the layout; needs no process group.

    Raises:
        ModelError: the message contains the reason.
    """
    _refuse_layers(net, layout, plan)
    if layout.pp > 1:
        split_layers(net, layout.num_stages, named=pp_split, example=example)


def _is_without_data(net: nn.Module) -> bool:
    return any(weight.is_meta for weight in net.parameters())


def _refuse_layers(net: nn.Module, layout: MeshLayout, plan: Mapping[str, str] | None) -> None:
    for name, module in net.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and (layout.dp_shard > 1 or layout.pp > 1):
            raise ModelError(
                f"the layout {layout} does not support the batch normalization {name}, whose running statistics would "
                "differ between ranks; use another normalization, or a layout of replicas (DDP)"
            )
    if layout.tp > 1:
        _check_plan(net, plan if plan is not None else getattr(net, "tp_plan", None) or {}, layout)


def _check_plan(net: nn.Module, plan: Mapping[str, str], layout: MeshLayout) -> None:
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


def _cut_layers(part: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str], sequence_parallel: bool) -> None:
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


def _tell_dropouts(net: nn.Module, coordinates: RankCoordinates, plan: Mapping[str, str]) -> None:
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


def _in_bf16(forward: Forward) -> Forward:
    """Applies autocast inside of a stage, since torch's schedules call it several times, and once for its shapes."""

    def computed(self: nn.Module, *given: Tensor, **rows: Tensor) -> Any:
        with torch.autocast(given[0].device.type, torch.bfloat16, enabled=self.training):
            return forward(self, *given, **rows)

    return computed


def _shard(part: nn.Module, mesh: DeviceMesh, layout: MeshLayout, precision: str, unit_mib: float) -> None:
    """FSDP2: gathers the weights of a group of layers for its forward and backward pass, and scatters its gradients.

    Each group costs three collective operations per step, which would dominate in a model of many small layers.
    """
    over = mesh["dp_replicate", "dp_shard"] if layout.dp_replicate > 1 else mesh["dp_shard"]
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if precision == "bf16" else MixedPrecisionPolicy()
    # A pipeline runs each stage many times per step: gathering for each micro-batch would cost more than the memory.
    # Nothing here changes an output in place, which torch warns about; verify-parallel finds a model that does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    for group in neighbours(part, unit_mib * 2**20):
        fully_shard(group, mesh=over, mp_policy=policy, reshard_after_forward=layout.pp == 1)
    # The remaining layers are small, and needed again at the start of the backward pass.
    fully_shard(part, mesh=over, mp_policy=policy, reshard_after_forward=False)
