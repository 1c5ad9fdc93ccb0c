"""The process group of a run: how long a rank waits for another one."""

import time

import pytest
import torch
import torch.distributed as dist

from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.ranks.process_group import bound_waits
from maas_ray.train.spec.parallelism import MeshLayout
from tests.support.ranks import run_ranks


def _wait_for_a_late_rank(rank: int, timeout_s: float | None) -> list[str]:
    coordinates = rank_coordinates(MeshLayout(dp_replicate=2), "cpu")
    assert coordinates.mesh is not None
    if timeout_s is not None:
        bound_waits(coordinates.mesh, timeout_s)
    said = []
    for axis in coordinates.mesh.mesh_dim_names or ():
        value = torch.ones(1)
        group = coordinates.mesh.get_group(axis)
        dist.all_reduce(value, group=group)  # what connects them
        if rank == 1:
            time.sleep(1.5)  # nothing is checked by the clock: this only has to be longer than the bound
        try:
            dist.all_reduce(value, group=group)
            said.append("answered")
        except RuntimeError as error:
            said.append(str(error))
    return said


@pytest.mark.parametrize(("timeout_s", "said"), [(0.5, "Timed out waiting 500ms"), (None, "answered")])
def test_the_groups_of_a_mesh_have_the_given_timeout(timeout_s: float | None, said: str) -> None:
    (message,) = run_ranks(_wait_for_a_late_rank, 2, timeout_s)[0]
    assert said in message
