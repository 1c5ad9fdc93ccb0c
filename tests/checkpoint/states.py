"""Small states, and ways to distribute them over ranks."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from maas_ray.checkpoint import parts, upload
from maas_ray.checkpoint.save import Snapshot

PREFIX = "runs/r/checkpoints"


def small_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Every kind of tensor that a training state has, in half a megabyte."""
    draw = torch.Generator().manual_seed(seed)
    return {
        "model.weight": torch.randn(200, 300, generator=draw),
        "model.bias": torch.randn(7, generator=draw),
        "model.half": torch.randn(65, 33, generator=draw).bfloat16(),
        "model.steps": torch.arange(5) + seed,
        "model.mask": torch.tensor([True, False, True]),
        "model.nothing": torch.empty(0, 4),
        "optimizer.weight.exp_avg": torch.randn(200, 300, generator=draw, dtype=torch.float64),
        "optimizer.weight.step": torch.tensor(float(seed)),
    }


def snapshot(step: int, tensors: Mapping[str, Tensor] | None = None, **meta: object) -> Snapshot:
    chosen = small_tensors(step) if tensors is None else tensors
    return Snapshot(step, step * 8, chosen, {"seed": 5, **meta}, [{"step": 1, "loss": 0.25}])


def zeros(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}


def is_equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Equal names, types and bits."""
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


def small_parts(monkeypatch: pytest.MonkeyPatch, size: int = 64 << 10) -> None:
    """Makes several parts of what would be one, written one after the other, so that operations have an order."""
    monkeypatch.setattr(parts, "PART_BYTES", size)
    monkeypatch.setattr(upload, "IN_FLIGHT", 1)


LAYOUTS: dict[str, tuple[list[int] | list[list[int]], list[Placement]] | None] = {
    "plain": None,
    "rows 1": ([0], [Shard(0)]),
    "rows 2": ([0, 1], [Shard(0)]),
    "rows 4": ([0, 1, 2, 3], [Shard(0)]),
    "columns 2": ([0, 1], [Shard(1)]),
    "columns 4": ([0, 1, 2, 3], [Shard(1)]),
    "rows 2 x columns 2": ([[0, 1], [2, 3]], [Shard(0), Shard(1)]),
    "columns 2 x rows 2": ([[0, 1], [2, 3]], [Shard(1), Shard(0)]),
    "replicas 2 x rows 2": ([[0, 1], [2, 3]], [Replicate(), Shard(0)]),
    "rows 2 of rows 2": ([[0, 1], [2, 3]], [Shard(0), Shard(0)]),
}
"""How 4 ranks hold a tensor: a mesh of ranks and placements; None: every rank holds all of it."""


def spread(tensors: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """The same values under a layout; dimensions that a tensor does not have are replicated."""
    chosen = LAYOUTS[layout]
    if chosen is None:
        return {name: tensor.clone() for name, tensor in tensors.items()}
    ranks, wanted = chosen
    mesh = DeviceMesh("cpu", torch.tensor(ranks))
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        placements = [Replicate() if isinstance(each, Shard) and each.dim >= tensor.dim() else each for each in wanted]
        local = tensor
        for dim, placement in enumerate(placements):
            if isinstance(placement, Shard) and mesh.get_coordinate() is not None:
                pieces = local.chunk(mesh.size(dim), placement.dim)
                place = mesh.get_coordinate()[dim]
                empty = local.narrow(placement.dim, 0, 0)
                local = pieces[place] if place < len(pieces) else empty
        held[name] = DTensor.from_local(
            local.clone(), mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
        )
    return held


def local_values(tensor: Tensor) -> Tensor | None:
    """What this rank holds; None outside of the mesh."""
    if not isinstance(tensor, DTensor):
        return tensor
    return None if tensor.device_mesh.get_coordinate() is None else tensor.to_local()
