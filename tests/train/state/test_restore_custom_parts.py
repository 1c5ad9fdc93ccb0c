"""What a spec names by import path: a run that is resumed equals the undisturbed one, and layouts train the same."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from maas_ray.checkpoint.catalog import open_checkpoint, read_saved
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.stored.dataset import Dataset
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.optim.state import group_numbers
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import restore, tensors_of
from maas_ray.train.verify import verify_layouts
from tests.support.small_runs import make_run

PARTS = "tests.support.custom_parts"
STEPS, SAVED_AT = 6, 3
CUSTOM: dict[str, Any] = {
    "objective": {"loss": f"{PARTS}:TunedLoss", "params": {"power": 1.5}},
    "optimizer": {"name": f"{PARTS}:Momentum", "params": {"decay": 0.8}, "lr": 0.05},
    "schedule": {"name": f"{PARTS}:halved", "warmup_steps": 1},
}
FREE = {"name": "schedulefree:AdamWScheduleFree", "lr": 0.05, "params": {"warmup_steps": 2}}


def _state(spec: TrainSpec, dataset: Dataset) -> TrainState:
    rows = dataset.num_rows["train"]
    return build_train_state(spec, dataset.features, rows, RankCoordinates(MeshLayout(), None), torch.device("cpu"))


def _train(spec: TrainSpec, dataset: Dataset, state: TrainState, first: int, last: int) -> list[float]:
    plan = build_plan(spec, dataset.num_rows["train"])
    loader = build_loader(spec, dataset, state.coordinates)
    state.train()
    return [mean_loss(state, train_step(plan, state, loader, step)[0], step) for step in range(first, last)]


EXPERTS = f"{PARTS}:Experts"


@pytest.mark.parametrize(
    "changes",
    [
        CUSTOM,
        {**CUSTOM, "optimizer": {"name": "torch.optim:NAdam"}},
        {**CUSTOM, "optimizer": {"name": "torch.optim:Adafactor"}, "schedule": {"name": "one_cycle"}},
        {**CUSTOM, "optimizer": FREE, "schedule": {"name": "constant"}},
        {"optimizer": {"name": "muon"}, "objective": {"loss": "focal"}, "schedule": {"name": "warmup_stable_decay"}},
        {
            "objective": {"auxiliary": {"size": 0.1, "ignored": 0.0}},
            "optimizer": {"name": f"{PARTS}:Momentum"},
        },
    ],
    ids=["custom", "nadam", "adafactor", "schedule-free", "muon", "auxiliary"],
)
def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit(
    file_store: ObstoreStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    model = EXPERTS if "auxiliary" in changes["objective"] else "mlp"
    spec, dataset = make_run(file_store, tmp_path, model, steps=STEPS, **changes)
    undisturbed = _state(spec, dataset)
    _train(spec, dataset, undisturbed, 0, SAVED_AT)
    numbers = json.loads(json.dumps(group_numbers(undisturbed.optimizer)))
    snapshot = Snapshot(SAVED_AT, 36, tensors_of(undisturbed), meta={"optimizer": numbers})
    committed = save(file_store, "c", snapshot)
    losses = _train(spec, dataset, undisturbed, SAVED_AT, STEPS)

    resumed = _state(spec, dataset)
    found = read_saved(open_checkpoint(file_store, "c")).meta["optimizer"]
    restore(resumed, SAVED_AT, read_index(committed), lambda wanted: load_into(committed, wanted), found)
    assert _train(spec, dataset, resumed, SAVED_AT, STEPS) == losses
    weights = tensors_of(undisturbed)
    assert tensors_of(resumed).keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in tensors_of(resumed).items())


@pytest.mark.fault
def test_every_layout_trains_the_same_with_a_loss_and_an_optimizer_of_others(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    objective = {"loss": "torch.nn:CrossEntropyLoss", "params": {"reduction": "none"}}
    spec, dataset = make_run(file_store, tmp_path, "decoder", **{**CUSTOM, "objective": objective})
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(tp=2), MeshLayout(pp=2)]
    compared = verify_layouts(spec, dataset.digest, layouts, steps=3)
    assert [one.refused for one in compared] == [None] * 4
    assert all(one.is_equal for one in compared), compared


@pytest.mark.fault
def test_a_schedule_free_optimizer_trains_the_same_on_every_layout(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder", optimizer=FREE, schedule={"name": "constant"})
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(tp=2), MeshLayout(pp=2)]
    compared = verify_layouts(spec, dataset.digest, layouts, steps=3)
    assert [one.refused for one in compared] == [None] * 4
    assert all(one.is_equal for one in compared), compared


@pytest.mark.fault
def test_muon_trains_the_same_where_its_matrices_are_cut(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder", optimizer={"name": "muon", "lr": 0.01})
    layouts = [MeshLayout(dp_shard=2), MeshLayout(tp=2), MeshLayout(pp=2)]
    compared = verify_layouts(spec, dataset.digest, layouts, steps=3)
    assert all(one.is_equal for one in compared), compared


@pytest.mark.fault
def test_auxiliary_losses_are_the_same_on_replicas_and_shards(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, EXPERTS, objective={"auxiliary": {"size": 0.1, "ignored": 0.2}})
    compared = verify_layouts(spec, dataset.digest, [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2)], steps=3)
    assert all(one.is_equal for one in compared), compared


def test_an_optimizer_whose_state_has_another_split_than_the_weight_is_refused_on_shards(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    optimizer = {"name": "torch.optim:Adafactor"}
    spec, dataset = make_run(file_store, tmp_path, "decoder", optimizer=optimizer)
    replicas, shards = verify_layouts(
        spec, dataset.digest, [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2)], steps=2
    )
    assert replicas.is_equal
    assert "split over ranks" in (shards.refused or "")
