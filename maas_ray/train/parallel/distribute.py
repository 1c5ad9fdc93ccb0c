"""Splits a whole model into the part of one rank: pipeline stages, tensor-parallel layers, shards or replicas.

Uses only torch's own parallelism, in the order in which it composes: pipeline stages, layers split by the plan
(DTensor), then shards or replicas (FSDP2 or DistributedDataParallel), all on one device mesh. NCCL on GPUs, gloo on
CPUs; untested on GPUs.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from maas_ray.errors import ModelError
from maas_ray.train.modules.blocks import Forward, neighbours, replace_forward
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.parallel.pipeline import split_layers
from maas_ray.train.parallel.tensor_parallel import check_plan, cut_layers, tell_dropouts
from maas_ray.train.spec.parallelism import MeshLayout


@dataclass(frozen=True)
class Parts:
    """The parts of the model that a rank trains.

    Attributes:
        bare: its parts of the model, with the names of the whole model; one, or two with interleaved stages.
        wrapped: the same parts wrapped for data parallelism, to be called.
    """

    bare: list[nn.Module]
    wrapped: list[nn.Module]


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
        tell_dropouts(net, coordinates, plan or {})
    stages = [net]
    if layout.pp > 1:
        stages = split_layers(net, layout.num_stages, named=pp_split, example=example, device=device)[
            coordinates.pp :: layout.pp
        ]
    parts = stages if _is_without_data(net) else [stage.to(device) for stage in stages]
    for part in parts:
        if layout.tp > 1:
            cut_layers(part, mesh["tp"], plan or {}, layout.sequence_parallel)
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
        check_plan(net, plan if plan is not None else getattr(net, "tp_plan", None) or {}, layout)


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
