"""The device mesh of a layout, and the coordinates of each rank in it."""

from dataclasses import dataclass
from hashlib import sha256

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from maas_ray.errors import ModelError, ResourcesMissing
from maas_ray.train.spec.parallelism import AXES, MeshLayout


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
