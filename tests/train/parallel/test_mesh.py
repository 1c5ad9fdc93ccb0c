"""How a model is cut: stages, plans, and what is refused with which reason."""

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from maas_ray.errors import ModelError, ResourcesMissing, SpecError
from maas_ray.train.modules.blocks import neighbours
from maas_ray.train.parallel.distribute import refuse_unfit
from maas_ray.train.parallel.mesh import rank_coordinates, refuse_far_groups
from maas_ray.train.parallel.pipeline import refuse_microbatches, split_layers
from maas_ray.train.spec.parallelism import MeshLayout, ParallelismSpec, possible_layouts
from tests.support.ranks import run_ranks


def _layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict((f"layer_{i}", nn.Linear(a, b)) for i, (a, b) in enumerate(pairwise(widths))))  # fmt: skip


def test_stages_are_as_equal_as_they_can_be_and_keep_the_names() -> None:
    net = _layers(8, 64, 8, 8, 8, 8)
    stages = split_layers(net, 2)
    assert [list(dict(stage.named_children())) for stage in stages] == [["layer_0"], ["layer_1", "layer_2", "layer_3", "layer_4"]]  # fmt: skip
    assert {name for stage in stages for name in stage.state_dict()} == set(net.state_dict())


def test_every_stage_has_weights_even_where_most_layers_have_none() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.ReLU(), nn.Linear(4, 4), nn.ReLU())
    assert [sum(1 for _ in stage.parameters()) for stage in split_layers(net, 2)] == [2, 2]


class _Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = _layers(4, 4)


def _tied() -> nn.Sequential:
    net = _layers(4, 4, 4, 4)
    net.layer_2.weight = net.layer_0.weight
    return net


@pytest.mark.parametrize(
    ("net", "layout", "plan", "message"),
    [
        (_layers(4, 4), MeshLayout(pp=2), None, "2 stages need 2 layers with weights"),
        (_Own(), MeshLayout(pp=2), None, "must be a torch.nn.Sequential"),
        (_tied(), MeshLayout(pp=3), None, "layer_0.weight and layer_2.weight are the same weight"),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)), MeshLayout(dp_shard=2), None, "batch normalization"),
        (_layers(4, 4), MeshLayout(tp=2), None, "has no tensor-parallel plan"),
        (_layers(4, 4), MeshLayout(tp=2), {"other": "colwise"}, "no layer of Sequential matches its plan"),
        (_layers(4, 6), MeshLayout(tp=4), {"layer_0": "colwise"}, "has 6 outputs, which 4 ranks cannot share"),
        (_layers(6, 4), MeshLayout(tp=4), {"layer_0": "rowwise"}, "has 6 inputs"),
        (_layers(4, 4), MeshLayout(tp=2), {"layer_0": "diagonal"}, "the style 'diagonal'; use one of colwise"),
        (
            _layers(4, 4),
            MeshLayout(tp=2, sequence_parallel=True),
            {"layer_0": "colwise"},
            "sequence_parallel: the plan",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_reason(
    net: nn.Module, layout: MeshLayout, plan: dict[str, str] | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        refuse_unfit(net, layout, plan)


@pytest.mark.parametrize(
    ("fields", "world", "expected"),
    [
        ({}, 4, MeshLayout(dp_replicate=4)),
        ({"tp": 2}, 4, MeshLayout(dp_replicate=2, tp=2)),
        ({"pp": 2, "dp_shard": 2}, 4, MeshLayout(pp=2, dp_shard=2)),
        ({"dp_shard": 3}, 4, "dp_shard 3 x tp 1 = 3 ranks, but workers.count is 4"),
        ({"dp_replicate": 2, "tp": 4}, 4, "= 8 ranks"),
    ],
)
def test_the_sizes_multiply_to_the_number_of_workers(
    fields: dict[str, Any], world: int, expected: MeshLayout | str
) -> None:
    spec = ParallelismSpec(**fields)
    if isinstance(expected, MeshLayout):
        assert spec.resolve(world) == expected
        return
    with pytest.raises(SpecError, match=expected):
        spec.resolve(world)


@pytest.mark.parametrize(("schedule", "number"), [("1f1b", 1), ("gpipe", 1), ("interleaved", 3)])
def test_a_pipeline_needs_enough_micro_batches(schedule: Any, number: int) -> None:
    with pytest.raises(SpecError, match="batch.accumulation_steps"):
        refuse_microbatches(MeshLayout(pp=2, schedule=schedule), number)
    refuse_microbatches(MeshLayout(pp=2, schedule=schedule), 4)


def test_every_axis_and_product_is_among_the_layouts_to_compare() -> None:
    found = list(possible_layouts(4, has_plan=True, num_layers=6, has_sequence=True))
    assert len(set(found)) == len(found)
    names = {str(layout) for layout in found}
    assert names >= {
        "DDP 2", "FSDP 2", "TP 2", "TP 2 +SP", "PP 2 gpipe", "PP 2 1f1b", "PP 2 interleaved", "HSDP 2x2", "FSDP 4",
        "FSDP 2 x TP 2", "FSDP 2 x PP 2 1f1b", "TP 2 x PP 2 1f1b",
    }  # fmt: skip
    without = list(possible_layouts(4, has_plan=False, num_layers=0, has_sequence=False))
    assert {(layout.tp, layout.pp) for layout in without} == {(1, 1)}


def _far(rank: int) -> str:
    layout = MeshLayout(tp=2)
    refuse_far_groups(layout, "here", torch.device("cpu"))
    try:
        refuse_far_groups(layout, f"node {rank}", torch.device("cpu"))
    except ResourcesMissing as error:
        return str(error)
    return ""


def test_a_tensor_parallel_group_on_two_nodes_is_refused_on_every_rank() -> None:
    assert all("the ranks 0 to 1 share matrix products but are on 2 nodes" in text for text in run_ranks(_far, 2))


def _places(rank: int) -> list[tuple[list[str], int, int, int, int]]:
    found = []
    for layout in (
        MeshLayout(dp_replicate=4),
        MeshLayout(dp_shard=4),
        MeshLayout(dp_replicate=2, tp=2),
        MeshLayout(pp=2, dp_shard=2),
    ):
        before = len(dist.distributed_c10d._world.pg_map)
        coordinates = rank_coordinates(layout, "cpu")
        groups = len(dist.distributed_c10d._world.pg_map) - before
        found.append((list(coordinates.mesh.mesh_dim_names), groups, coordinates.pp, coordinates.dp, coordinates.tp))
    return found


def test_a_rank_has_a_group_for_each_axis_that_its_layout_uses_and_no_other() -> None:
    assert run_ranks(_places, 4)[3] == [
        (["dp_replicate"], 0, 0, 3, 0),  # the default group is there already
        (["dp_shard"], 0, 0, 3, 0),
        (["dp_replicate", "dp_shard", "tp"], 3, 0, 1, 1),  # the replicas of a shard of one rank
        (["pp", "dp_shard"], 2, 1, 1, 0),
    ]


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0, [["layer_0"], ["layer_1"], ["layer_2"], ["layer_3"]]),
        (4 * 72 + 1, [["layer_0", "layer_1"], ["layer_2", "layer_3"]]),
        (4 * 72 * 3, [["layer_0", "layer_1", "layer_2"]]),
        (10_000, []),
    ],
)
def test_neighbouring_layers_are_gathered_together_until_they_are_large_enough(
    least: int, expected: list[list[str]]
) -> None:
    net = _layers(8, 8, 8, 8, 8)
    names = {id(layer): name for name, layer in net.named_children()}
    assert [[names[id(layer)] for layer in group] for group in neighbours(net, least)] == expected


def test_layers_that_share_a_weight_are_left_to_the_whole_model() -> None:
    net = _layers(4, 4, 4, 4)
    net.layer_2.weight = net.layer_0.weight
    assert neighbours(net, 0) == [[net.layer_1]]
