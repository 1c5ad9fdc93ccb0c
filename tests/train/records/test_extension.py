"""A longer length of a run: what is refused, what is recorded, and which samples the further steps use."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maas_ray.checkpoint.catalog import open_checkpoint
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.data.stored.dataset import Dataset
from maas_ray.errors import SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import train_step
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.records.extension import extend_run, with_length
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import restore, tensors_of
from tests.support.small_runs import make_run

ROWS, BATCH = 62, 12
ALONE = RankCoordinates(MeshLayout(), None)


def _finished(store: ObstoreStore, directory: Path, **changes: Any) -> tuple[TrainSpec, Dataset, TrainState]:
    """A run of one epoch, whose last step has 2 rows, and its final state."""
    spec, dataset = make_run(store, directory, "mlp", **{"steps": None, "epochs": 1, **changes})
    Runs(store).create(spec, dataset.digest, None)
    plan, state = build_plan(spec, ROWS), _state(spec, dataset)
    _train(spec, dataset, state, 0)
    save(store, checkpoints_prefix("r"), Snapshot(plan.total_steps, plan.stop, tensors_of(state)))
    Runs(store).record("r", {"type": "finished", "step": plan.total_steps})
    return spec, dataset, state


def _state(spec: TrainSpec, dataset: Dataset) -> TrainState:
    return build_train_state(spec, dataset.features, ROWS, ALONE, torch.device("cpu"))


def _train(spec: TrainSpec, dataset: Dataset, state: TrainState, first: int) -> None:
    plan, loader = build_plan(spec, ROWS), build_loader(spec, dataset, ALONE)
    state.train()
    for step in range(first, plan.total_steps):
        train_step(plan, state, loader, step)


def test_further_steps_begin_with_the_next_sample_and_use_each_one_once(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    spec, dataset, _ = _finished(file_store, tmp_path)
    extend_run(file_store, Runs(file_store).get("r"), spec, {"epochs": 3})
    longer = Runs(file_store).get("r").spec
    plan, loader = build_plan(longer, ROWS), build_loader(longer, dataset, ALONE)
    assert (plan.total_steps, longer.epochs) == (6 + 11, 3)
    positions = [
        batch.positions
        for step in range(plan.total_steps)
        for batch in loader.load(plan.position(step), _end(plan, step))
    ]
    assert torch.cat(positions).tolist() == list(range(3 * ROWS))
    assert [step for step in range(plan.total_steps) if plan.ends_epoch(step)] == [5, 11, 16]
    assert [plan.epoch(step) for step in (6, 17)] == [1.0, 3.0]


def _end(plan: Any, step: int) -> int:
    """The first step of the extension has other rows than the sixth, which ended with the epoch."""
    return ROWS if step < 6 else plan.stop


def test_an_extended_run_continues_from_its_last_state_bit_for_bit(file_store: ObstoreStore, tmp_path: Path) -> None:
    schedule = {"name": "cosine", "warmup_steps": 2}
    spec, dataset, state = _finished(file_store, tmp_path, schedule=schedule)
    assert state.schedule.lr == 0.0
    extend_run(file_store, Runs(file_store).get("r"), spec, {"epochs": 2})
    longer = Runs(file_store).get("r").spec
    committed = open_checkpoint(file_store, checkpoints_prefix("r"))
    outcomes = []
    for _ in range(2):
        resumed = _state(longer, dataset)
        restore(resumed, 6, read_index(committed), lambda wanted: load_into(committed, wanted))
        weights = resumed.parts[0].state_dict()
        assert all(torch.equal(value, weights[name]) for name, value in state.parts[0].state_dict().items())
        assert resumed.schedule.lr > 0.0, "the schedule is that of a run of two epochs"
        _train(longer, dataset, resumed, 6)
        assert resumed.schedule.lr == pytest.approx(0.0)
        outcomes.append(tensors_of(resumed))
    assert all(torch.equal(value, outcomes[1][name]) for name, value in outcomes[0].items())


def test_an_extension_is_recorded_once_and_the_old_spec_still_names_the_run(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    spec, _, _ = _finished(file_store, tmp_path)
    for _ in range(2):
        extend_run(file_store, Runs(file_store).get("r"), spec, {"epochs": 2})
    run = Runs(file_store).get("r")
    assert run.status == "stopped", "it waits to be continued"
    assert [each.status for each in Runs(file_store).all()] == ["stopped"]
    assert run.lengths == ((1, None), (2, None))
    assert [(each.step, each.position, each.epochs) for each in run.spec.extensions] == [(6, 62, 2)]
    extend_run(file_store, run, spec, {"epochs": 5})
    run = Runs(file_store).get("r")
    for epochs in (1, 2, 5):
        assert with_length(spec.model_copy(update={"epochs": epochs}), run) == run.spec
        assert run.spec.same_training(with_length(spec.model_copy(update={"epochs": epochs}), run)) == []
    other = spec.model_copy(update={"epochs": 4})
    assert run.spec.same_training(with_length(other, run)) == ["epochs"]


@pytest.mark.parametrize(
    ("changes", "extend", "message"),
    [
        ({}, {"epochs": 1}, "run 'r' has 1 epochs; give a larger number, not 1"),
        ({}, {"steps": 100}, "the length of this run is given in epochs; use epochs=N, not steps"),
        ({"epochs": None, "steps": 3}, {"epochs": 2}, "given in steps; use steps=N"),
        ({}, {"epochs": -1}, "epochs must be a positive integer, got -1"),
        ({}, {}, "not nothing"),
    ],
)
def test_what_is_no_larger_length_is_refused(
    file_store: ObstoreStore, tmp_path: Path, changes: dict[str, Any], extend: dict[str, int], message: str
) -> None:
    spec, _, _ = _finished(file_store, tmp_path, **changes)
    with pytest.raises(SpecError, match=message):
        extend_run(file_store, Runs(file_store).get("r"), spec, extend)
    assert Runs(file_store).get("r").spec.extensions == ()


def test_a_run_that_early_stopping_would_end_at_once_is_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, _, state = _finished(file_store, tmp_path)
    history = [{"step": 7 + number, "loss": 1.0, "lr": 0.1} for number in range(4)]
    save(file_store, checkpoints_prefix("r"), Snapshot(10, 62, tensors_of(state), history=history))
    early = TrainSpec.model_validate({**spec.model_dump(), "early_stopping": {"metric": "loss", "patience": 2}})
    with pytest.raises(SpecError, match=r"would end at once \(early stopping: loss .*; remove early_stopping"):
        extend_run(file_store, Runs(file_store).get("r"), early, {"epochs": 2})
    extend_run(file_store, Runs(file_store).get("r"), spec, {"epochs": 2})
