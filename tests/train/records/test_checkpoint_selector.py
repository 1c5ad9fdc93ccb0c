"""Which checkpoint and which weights evaluation and export take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import NotFound, SpecError
from maas_ray.optimize.publish import export_run
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_train_state
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.records.checkpoint_selector import choose_step, parse_which
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.state.restore import tensors_of
from maas_ray.train.validation.evaluate_run import evaluate_run
from maas_ray.train.validation.load_model import Trained, load_trained
from tests.support.small_runs import make_run

LOSSES = {1: 0.5, 2: 0.4, 3: 0.7}
AVERAGE = 10.0
"""How much larger the averages are than the weights, each of which is the number of its step."""


def _run(store: ObstoreStore, directory: Path, metric: str = "validation_loss", **changes: Any) -> None:
    spec, dataset = make_run(store, directory, "mlp", **changes)
    Runs(store).create(spec, dataset.digest, None)
    state = build_train_state(spec, dataset.features, 62, RankCoordinates(MeshLayout(), None), torch.device("cpu"))
    for step, loss in LOSSES.items():
        tensors = tensors_of(state)
        with torch.no_grad():
            for name, value in tensors.items():
                value.fill_(step * AVERAGE if name.startswith("ema.") else step)
        save(store, checkpoints_prefix("r"), Snapshot(step, 12 * step, tensors, {"metrics": {metric: loss}}))


def _value(trained: Trained) -> float:
    values = {float(value) for parameter in trained.net.parameters() for value in parameter.detach().flatten()}
    assert len(values) == 1
    return values.pop()


def test_the_spec_selects_the_best_checkpoint_and_the_averages(file_store: ObstoreStore, tmp_path: Path) -> None:
    _run(file_store, tmp_path, ema={"decay": 0.9}, checkpoint={"keep_best": 1, "use": "best"})
    assert _value(load_trained(file_store, "r")) == 2 * AVERAGE
    assert _value(load_trained(file_store, "r", "newest", weights="raw")) == 3
    assert _value(load_trained(file_store, "r", 1, weights="ema")) == AVERAGE
    run = Runs(file_store).get("r")
    Runs(file_store).record("r", {"type": "validated", "step": 1, "metrics": {"validation_loss": 0.1}})
    assert choose_step(file_store, run, "best") == 1, "a metric that came later counts"
    assert evaluate_run(file_store, "r", "validation", weights="raw").step == 1


@pytest.mark.fault
def test_a_bundle_reports_that_it_was_made_of_averages(file_store: ObstoreStore, tmp_path: Path) -> None:
    _run(file_store, tmp_path, ema={"decay": 0.9})
    exported = export_run(file_store, "r", 3, weights="raw")
    averaged = export_run(file_store, "r", 3)
    assert (exported.info.lineage.weights, averaged.info.lineage.weights) == (None, "ema")
    assert exported.bundle_id != averaged.bundle_id
    assert Registry(file_store).publish("m", averaged.bundle_id).version == 1


def test_the_newest_checkpoint_and_the_weights_themselves_are_taken_by_default(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    _run(file_store, tmp_path, metric="loss")
    assert _value(load_trained(file_store, "r")) == 3
    with pytest.raises(SpecError, match="keeps no average"):
        load_trained(file_store, "r", weights="ema")
    with pytest.raises(NotFound, match=r"has the metric validation_loss \(checkpoint.metric\) .* steps 1, 2, 3"):
        choose_step(file_store, Runs(file_store).get("r"), "best")
    with pytest.raises(NotFound, match="of step 9"):
        load_trained(file_store, "r", 9)


def test_retention_ranks_by_metrics_that_came_after_the_commit(file_store: ObstoreStore, tmp_path: Path) -> None:
    _run(file_store, tmp_path)
    late: dict[int, dict[str, float]] = {}
    keep = Keep(last=1, best=1, metric="validation_loss")
    retention = Retention(file_store, checkpoints_prefix("r"), keep, late)
    late[1] = {"validation_loss": 0.1}
    assert retention.apply() == [2], "the best one is now the first"


@pytest.mark.parametrize(("text", "which"), [(None, None), ("best", "best"), ("newest", "newest"), ("120", 120)])
def test_a_checkpoint_is_named_by_a_word_or_a_step(text: str | None, which: Any) -> None:
    assert parse_which(text) == which
    with pytest.raises(SpecError, match="'bset' selects no checkpoint; give newest, best, or a step"):
        parse_which("bset")
