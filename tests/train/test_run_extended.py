"""A finished run that is trained longer on Ray Train, and the way there that a resume with another length names."""

import pytest

from maas_ray.checkpoint.catalog import open_checkpoint, read_saved
from maas_ray.data.stored.dataset import open_dataset
from maas_ray.errors import SpecError
from maas_ray.store.objects import ObstoreStore, StorageSpec
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.run import run_training
from tests.conftest import RayCluster
from tests.support.paths import digits_spec

PARTS = "tests.support.custom_parts"


@pytest.mark.fault
def test_a_finished_run_is_extended_with_a_loss_an_optimizer_and_metrics_of_others(
    file_store: ObstoreStore, ray_cluster: RayCluster
) -> None:
    changes = {
        "steps": None,
        "epochs": 1,
        "workers": {"count": 2},
        "log_every": 1,
        "objective": {"loss": f"{PARTS}:TunedLoss", "params": {"power": 1.5}},
        "optimizer": {"name": f"{PARTS}:Momentum", "lr": 0.01},
        "schedule": {"name": "plateau", "metric": "validation_misses", "mode": "min", "factor": 0.5, "patience": 1},
        "metrics": [{"name": f"{PARTS}:Misses"}, {"name": f"{PARTS}:is_right"}],
    }
    spec = digits_spec(StorageSpec(uri=file_store.uri), "r", **changes)
    first = run_training(spec)
    num_rows = open_dataset(file_store, first.data_digest).num_rows
    size, (train, held_out) = spec.batch.global_size, (num_rows["train"], num_rows["validation"])
    assert train % size, "the last step of the first epoch has fewer rows"
    assert first.step == -(-train // size)
    with pytest.raises(SpecError, match=r"run 'r' has 1 epochs, but the spec has 4 epochs; .*--extend epochs=N"):
        run_training(spec.model_copy(update={"epochs": 4}), resume=True)

    longer = run_training(spec, extend={"epochs": 4})
    run = Runs(file_store).get("r")
    assert (longer.step, run.status, run.spec.epochs) == (first.step + -(-3 * train // size), "finished", 4)
    assert run_training(spec, resume=True) == longer, "a finished run is left alone, whatever length the spec has"
    assert longer.report != first.report
    history = read_saved(open_checkpoint(file_store, checkpoints_prefix("r"))).history
    validated = [entry["validation"] for entry in history if "validation" in entry]
    assert len(validated) == 4
    assert all(0 <= each["misses"] <= held_out and each["misses"] == round(each["misses"]) for each in validated)
    assert all(each["is_right"] == pytest.approx(each["accuracy"]) for each in validated)
    rates = {entry["step"]: entry["lr"] for entry in history if "lr" in entry}
    best, expected, scale = float("inf"), {}, 1.0
    for step in sorted(rates):
        expected[step] = 0.01 * scale
        for each in [
            entry["validation"]["misses"] for entry in history if entry["step"] == step and "validation" in entry
        ]:
            scale, best = (scale, each) if each < best else (scale * 0.5, best)
    assert rates == pytest.approx(expected)
