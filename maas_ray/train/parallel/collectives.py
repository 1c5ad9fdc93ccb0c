"""Messages of one value between all ranks, and the ranks that share a row. Independent of Ray."""

from datetime import timedelta

import torch
import torch.distributed as dist

from maas_ray.train.parallel.mesh import RankCoordinates


def decided_by_rank0(decision: bool, device: torch.device) -> bool:
    """Returns the decision of rank 0 on every rank. Collective.

    Args:
        decision: the decision; ignored on other ranks than 0.
        device: device of this rank.
    """
    return bool(number_of_rank0(float(decision), device))


def number_of_rank0(number: float, device: torch.device) -> float:
    """Returns a number of rank 0 on every rank, bit for bit. Collective.

    Args:
        number: the number; ignored on other ranks than 0.
        device: device of this rank.
    """
    said = torch.tensor([number], dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.broadcast(said, src=0)
    return float(said)


def data_parallel_group(coordinates: RankCoordinates, timeout_s: float) -> dist.ProcessGroup | None:
    """The group of this rank and all ranks with other rows and the same part of the model. Collective over it.

    Args:
        coordinates: coordinates of this rank.
        timeout_s: timeout of each operation, if the group is created.

    Returns:
        None if there is only this rank.
    """
    layout, mesh = coordinates.layout, coordinates.mesh
    if mesh is None or layout.dp == 1:
        return None
    if layout.dp == layout.world:
        return dist.group.WORLD
    if layout.dp in (layout.dp_replicate, layout.dp_shard):
        return mesh["dp_shard" if layout.dp == layout.dp_shard else "dp_replicate"].get_group()
    ranks = [(coordinates.pp * layout.dp + number) * layout.tp + coordinates.tp for number in range(layout.dp)]
    group: dist.ProcessGroup = dist.new_group(
        ranks, timeout=timedelta(seconds=timeout_s), use_local_synchronization=True
    )
    return group
