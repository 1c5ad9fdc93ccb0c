"""A state saved under one layout continues under any other: the next step is the same."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint
from maas_ray.checkpoint.collectives import saving_group
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.stored.dataset import Dataset
from maas_ray.errors import ObjectCorrupt
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import restore, tensors_of
from tests.support.ranks import run_ranks
from tests.support.small_runs import make_run

STEPS_BEFORE, STEPS_AFTER = 2, 2
TWO = [{"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2, "sequence_parallel": True}, {"pp": 2}]
FOUR = [{"dp_shard": 4}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"pp": 2, "tp": 2}, {"pp": 4}]


def _prefix(layout: dict[str, Any]) -> str:
    return "/".join(["from", *(f"{name}-{value}" for name, value in layout.items())]) or "from"


class _Run:
    """A decoder in float64 on a layout, dropout on."""

    def __init__(self, spec: TrainSpec, dataset: Dataset, layout: dict[str, Any]) -> None:
        self.layout = MeshLayout(**layout)
        batch = spec.batch.model_copy(update={"accumulation_steps": 2 * self.layout.pp})
        spec = spec.model_copy(update={"batch": batch})
        coordinates = rank_coordinates(self.layout, "cpu")
        rows = dataset.num_rows["train"]
        self.state: TrainState = build_train_state(
            spec, dataset.features, rows, coordinates, torch.device("cpu"), torch.float64
        )
        self.plan, self.loader = build_plan(spec, rows), build_loader(spec, dataset, coordinates)
        self.state.train()

    def steps(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            share, _ = train_step(self.plan, self.state, self.loader, step)
            losses.append(mean_loss(self.state, share, step))
        return losses


def _save_each(store: ObstoreStore, spec: TrainSpec, dataset: Dataset, layouts: list[dict[str, Any]]) -> None:
    group = saving_group(60.0)
    for layout in layouts:
        run = _Run(spec, dataset, layout)
        run.steps(0, STEPS_BEFORE)
        save(store, _prefix(layout), Snapshot(STEPS_BEFORE, 24, tensors_of(run.state)), group)


def _load_each(
    store: ObstoreStore, spec: TrainSpec, dataset: Dataset, saved: list[dict[str, Any]], layouts: list[dict[str, Any]]
) -> dict[str, list[float]]:
    losses = {}
    for origin in saved:
        committed = open_checkpoint(store, _prefix(origin))
        for layout in layouts:
            run = _Run(spec, dataset, layout)
            restore(run.state, STEPS_BEFORE, read_index(committed), lambda wanted, c=committed: load_into(c, wanted))
            losses[f"{origin} -> {layout}"] = run.steps(STEPS_BEFORE, STEPS_AFTER)
    return losses


def _ranks(rank: int, directory: str, saves: list[dict[str, Any]], loads: list[Any], layouts: list[Any]) -> Any:
    store = open_store(f"{directory}/store")
    spec, dataset = make_run(store, Path(directory), "decoder", steps=STEPS_BEFORE + STEPS_AFTER) if rank == 0 else (None, None)  # fmt: skip
    if dist.is_initialized():
        dist.barrier()
    if rank:
        spec, dataset = make_run(store, Path(directory), "decoder", steps=STEPS_BEFORE + STEPS_AFTER)
    _save_each(store, spec, dataset, saves)
    return _load_each(store, spec, dataset, loads, layouts)


def _assert_all_pairs_agree(tmp_path: Path, worlds: dict[int, list[dict[str, Any]]]) -> None:
    directory = str(tmp_path)
    expected = _ranks(0, directory, [{}], [{}], [{}])["{} -> {}"]
    everything = [{}, *(layout for layouts in worlds.values() for layout in layouts)]
    losses: dict[str, list[float]] = {}
    for world, layouts in worlds.items():
        run_ranks(_ranks, world, directory, layouts, [], [])
    losses |= _ranks(0, directory, [], everything, [{}])
    for world, layouts in worlds.items():
        losses |= run_ranks(_ranks, world, directory, [], everything, layouts)[0]
    assert len(losses) == len(everything) ** 2
    for pair, found in losses.items():
        assert found == pytest.approx(expected, abs=1e-10), pair


def test_a_state_saved_under_any_layout_of_two_ranks_continues_under_any_other(tmp_path: Path) -> None:
    _assert_all_pairs_agree(tmp_path, {2: [TWO[1], TWO[2], TWO[3]]})


@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_a_state_saved_under_any_layout_of_up_to_four_ranks_continues_under_any_other(tmp_path: Path) -> None:
    _assert_all_pairs_agree(tmp_path, {2: TWO, 4: FOUR})


def test_a_state_of_another_model_is_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    run = _Run(spec, dataset, {})
    tensors = tensors_of(run.state)
    missing = next(iter(tensors))
    del tensors[missing]
    save(file_store, "from", Snapshot(1, 12, tensors))
    assert list_checkpoints(file_store, "from") == [1]
    committed = open_checkpoint(file_store, "from")
    with pytest.raises(ObjectCorrupt, match=missing):
        restore(run.state, 1, read_index(committed), lambda wanted: load_into(committed, wanted))
