"""Runs on Ray Train under other layouts than replicas: trained, validated, saved, and resumed from another layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.util.placement_group import placement_group_table

from maas_ray.checkpoint.catalog import describe, open_checkpoint, read_saved
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import ModelError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.run import run_training
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.state.restore import tensors_of
from maas_ray.train.validation.load_model import evaluate_trained, load_trained
from tests.conftest import RayCluster
from tests.support.small_runs import make_run

STEPS, SAVED_AT = 16, 12
"""After the last step comes a validation."""


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param({"pp": 2}, marks=pytest.mark.fault),
        pytest.param({"dp_shard": 2}, marks=pytest.mark.fault),
        pytest.param({"tp": 2, "sequence_parallel": True}, marks=pytest.mark.fault),
        pytest.param({"dp_replicate": 2}, marks=pytest.mark.fault),
    ],
)
def test_a_run_of_one_process_continues_under_another_layout(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path, layout: dict[str, Any]
) -> None:
    changes = {"steps": STEPS, "log_every": 1, "batch": {"global_size": 12, "accumulation_steps": 2}}
    changes |= {"ema": {"decay": 0.8}, "validate_every": SAVED_AT + 2}  # trains on after a validation of the averages
    spec, dataset = make_run(file_store, tmp_path, "decoder", **changes)
    losses = _train_alone(file_store, spec, dataset)
    moved = spec.model_validate({**spec.model_dump(), "workers": {"count": 2}, "parallelism": layout})
    result = run_training(moved, resume=True)
    assert (result.step, Runs(file_store).get("r").status) == (STEPS, "finished")
    prefix = checkpoints_prefix("r")
    saved = read_saved(open_checkpoint(file_store, prefix))
    resumed = {entry["step"]: entry["loss"] for entry in saved.history if "loss" in entry}
    assert resumed == pytest.approx({step: losses[step - 1] for step in range(SAVED_AT + 1, STEPS + 1)}, rel=1e-4)
    assert describe(file_store, prefix)[-1]["layout"] == str(MeshLayout(**layout))
    # What the ranks found on the validation split together is what one process finds with the whole weights.
    expected = evaluate_trained(load_trained(file_store, "r"), "validation").metrics
    assert result.metrics["validation_loss"] == pytest.approx(expected["loss"], rel=1e-5)
    raw = evaluate_trained(load_trained(file_store, "r", weights="raw"), "validation").metrics
    assert raw["loss"] != pytest.approx(expected["loss"], rel=1e-3), "validation looks at the averages"


def _train_alone(store: ObstoreStore, spec: Any, dataset: Any) -> list[float]:
    """Every loss of the undisturbed run; commits the state after `SAVED_AT` steps as the run's."""
    Runs(store).create(spec, dataset.digest, None)
    coordinates, num_rows = rank_coordinates(MeshLayout(), "cpu"), dataset.num_rows["train"]
    state = build_train_state(spec, dataset.features, num_rows, coordinates, torch.device("cpu"))
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    state.train()
    losses = []
    for step in range(STEPS):
        share, _ = train_step(plan, state, loader, step)
        losses.append(mean_loss(state, share, step))
        if step + 1 == SAVED_AT:
            save(store, checkpoints_prefix("r"), Snapshot(SAVED_AT, SAVED_AT * 12, tensors_of(state)))
    return losses


@pytest.mark.fault
def test_ranks_that_share_matrix_products_are_placed_together(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    changes = {"workers": {"count": 4}, "parallelism": {"tp": 2, "dp_replicate": 2}, "log_every": 1, "steps": 200}
    spec, _ = make_run(file_store, tmp_path, "decoder", **changes)
    seen: list[list[dict[str, float]]] = []

    def look(_: object) -> None:
        live = [one for one in placement_group_table().values() if one["state"] == "CREATED"]
        seen.extend(sorted(one["bundles"].values(), key=str) for one in live)

    run_training(spec, on_progress=look)
    assert [{"CPU": 2.0}, {"CPU": 2.0}] in seen


@pytest.mark.fault  # tests/train/parallel/test_mesh.py shows the refusals, tests/train/test_run.py how one of rank 0 ends a run
def test_a_layout_that_the_model_cannot_have_is_refused_and_no_run_is_left(
    file_store: ObstoreStore, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    spec, _ = make_run(file_store, tmp_path, "decoder", workers={"count": 3}, parallelism={"tp": 3})
    with pytest.raises(ModelError, match="3 ranks cannot share"):
        run_training(spec)
    assert Runs(file_store).all() == []
