"""Batch normalization and few rows: rows are shared out so that none is alone, empty ranks change no statistics."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from maas_ray.data.loading.loader import Loader, share_out
from maas_ray.errors import SpecError
from maas_ray.models.spec import ModelSpec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.modules.batch_statistics import fewest_rows, frozen_statistics, refuse_lone_row
from maas_ray.train.parallel.mesh import RankCoordinates, rank_coordinates
from maas_ray.train.spec.parallelism import MeshLayout
from tests.support.ranks import run_ranks
from tests.support.small_runs import make_run

NORMALIZED = ModelSpec(name="mlp", params={"size": 1, "norm": "batch", "dropout": 0.0})


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_no_micro_batch_has_a_single_row_for_any_remainder(world: int, accumulation: int) -> None:
    for num_rows in range(1, 4 * world * accumulation + 2):
        pieces = [
            piece.tolist() for rank in range(world) for piece in share_out(num_rows, rank, world, accumulation, 2)
        ]
        assert sorted(number for piece in pieces for number in piece) == list(range(num_rows))
        sizes = {len(piece) for piece in pieces if piece}
        assert sizes == {1} if num_rows == 1 else min(sizes) >= 2
        if num_rows >= 2 * world * accumulation:  # as without a smallest number
            plain = [
                piece.tolist() for rank in range(world) for piece in share_out(num_rows, rank, world, accumulation)
            ]
            assert pieces == plain


def test_a_loader_without_a_smallest_number_shares_rows_as_before() -> None:
    rows, target = [np.arange(10, dtype=np.float32).reshape(-1, 1)], np.arange(10)
    loaders = [
        Loader(rows, target, seed=0, global_batch=3, rank=rank, world=2, accumulation_steps=2) for rank in range(2)
    ]
    sizes = [[batch.num_rows for batch in loader.load(9, 10)] for loader in loaders]
    assert sizes == [[1, 0], [0, 0]]
    assert [batch.positions.tolist() for batch in loaders[0].load(0, 10)] == [[0], [2]]


@pytest.mark.parametrize(
    ("global_size", "stop", "says"),
    [
        (64, 65, "the last of 2 steps has 1 row .65 rows in batches of 64.*set steps: 1 instead of epochs.*to 65$"),
        (64, 129, "the last of 3 steps has 1 row.*set steps: 2 .*batch.global_size to 65"),
        (3, 13, "batch.global_size to 5$"),
        (1, 10, "every step has 1 row.*batch.global_size to 2 or more"),
        (8, 1, "the run has 1 row in all"),
    ],
)
def test_a_step_of_one_row_is_refused_with_the_change_that_avoids_it(global_size: int, stop: int, says: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    with pytest.raises(SpecError, match=says):
        refuse_lone_row(net, torch.zeros(3, 4), global_size, stop)


@pytest.mark.parametrize(
    ("net", "row"),
    [
        (nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)), (4,)),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), (1, 8, 8)),
    ],
)
def test_models_that_can_compute_with_one_row_are_not_refused(net: nn.Module, row: tuple[int, ...]) -> None:
    before = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()
    refuse_lone_row(net, torch.zeros(3, *row), 64, 65)
    assert not net.training
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    refuse_lone_row(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), torch.zeros(3, 4), 64, 66)


def test_rows_that_do_not_count_change_no_statistics() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))
    with frozen_statistics([net]):
        net(torch.zeros(1, 3))
        assert net[1].training
    assert net[0].training
    assert net[0].num_batches_tracked == 0
    assert fewest_rows([net]) == 2
    assert fewest_rows([net[1]]) == 1


@pytest.mark.fault
@pytest.mark.parametrize("world", [1, 2])
def test_every_remainder_trains_to_the_end_with_finite_statistics(
    file_store: ObstoreStore, tmp_path: Path, world: int
) -> None:
    run_ranks(_train_all_remainders, world, file_store.uri, str(tmp_path))


def _train_all_remainders(rank: int, uri: str, directory: str) -> None:
    from maas_ray.store.objects import StorageSpec, open_store

    store = open_store(StorageSpec(uri=uri))
    world = dist.get_world_size() if dist.is_initialized() else 1
    coordinates = (
        rank_coordinates(MeshLayout(dp_replicate=world), "cpu") if world > 1 else RankCoordinates(MeshLayout(), None)
    )
    for size in (60, 59, 58, 15, 14):  # 62 rows: remainders of 2, 3, 4, 2 and 6
        spec, dataset = make_run(store, Path(directory), "mlp", steps=None, epochs=1, batch={"global_size": size})
        spec = spec.model_copy(update={"model": NORMALIZED})
        state = build_train_state(spec, dataset.features, 62, coordinates, torch.device("cpu"))
        plan, loader = build_plan(spec, 62), build_loader(spec, dataset, coordinates, state.min_rows)
        state.train()
        for step in range(plan.total_steps):
            share, _ = train_step(plan, state, loader, step)
            assert np.isfinite(mean_loss(state, share, step))
        for name, value in state.parts[0].named_buffers():
            if "running" in name:
                assert value.isfinite().all()
            else:
                had_rows = coordinates.dp == 0 or 62 % size >= 4
                assert int(value) == plan.total_steps - (not had_rows)
