"""Classical runs on a real cluster, by the commands that every run takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from maas_ray.bundle.format import load_info
from maas_ray.cli.app import app
from maas_ray.errors import DataError, ResourcesMissing
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.progress import Progress
from maas_ray.train.records.runs import Runs
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster


def _document(store: ObstoreStore, **changes: Any) -> dict[str, Any]:
    document = {
        "run": "r",
        "model": {"name": "random_forest", "params": {"size": 10}},
        "data": {"uri": "sklearn:iris", "task": "classification"},
        "workers": {"cpus": 2},
        "storage": {"uri": store.uri},
    }
    return {**document, **changes}


@pytest.mark.fault
def test_a_forest_goes_from_a_spec_to_a_published_version(
    ray_cluster: RayCluster, file_store: ObstoreStore, tmp_path: Path
) -> None:
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(_document(file_store)))
    environment = {"MAAS_RAY_HOME": str(ray_cluster.state_dir), "MAAS_RAY_STORE": file_store.uri}

    def call(*arguments: str) -> Any:
        result: Result = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    trained = call("train", str(tmp_path / "train.yaml"))
    assert (trained["run"], trained["step"], trained["checkpoint_step"]) == ("r", 1, 1)
    assert trained["metrics"].keys() >= {"loss", "validation_accuracy"}
    assert any(Path(trained["tensorboard"]).iterdir())
    log = Runs(file_store).get("r")
    assert call("train", str(tmp_path / "train.yaml"), "--resume") == trained, "a finished run is left alone"
    assert Runs(file_store).get("r") == log
    assert call("evaluate", "r")["metrics"]["accuracy"] > 0.85
    assert call("publish", "r", "--name", "iris", "--promote", "production")["version"] == 1
    registry = Registry(file_store)
    info = load_info(file_store, registry.resolve("iris").bundle)
    assert info.labels == ("setosa", "versicolor", "virginica")
    assert info.parity["versions"]["scikit-learn"]
    assert [run["status"] for run in call("runs")] == ["finished"]


@pytest.mark.fault
def test_a_run_whose_result_was_not_reported_is_trained_again_to_the_same_bytes(
    ray_cluster: RayCluster, file_store: ObstoreStore
) -> None:
    spec = TrainSpec.model_validate(_document(file_store, workers={"cpus": 1}))
    reports: list[Progress] = []
    first = run_training(spec, on_progress=reports.append)
    assert [report.step for report in reports] == [0, 1]
    Runs(file_store).record("r", {"type": "started", "workers": 1})  # as if killed before it could say so
    more_cpus = TrainSpec.model_validate(_document(file_store, workers={"cpus": 3}))
    assert run_training(more_cpus, resume=True) == first
    assert Runs(file_store).get("r").status == "finished"


@pytest.mark.fault
def test_impossible_settings_are_reported_before_or_by_the_task(
    ray_cluster: RayCluster, file_store: ObstoreStore
) -> None:
    with pytest.raises(ResourcesMissing, match="needs 99 CPU"):
        run_training(TrainSpec.model_validate(_document(file_store, workers={"cpus": 99})))
    small = {"name": "svm", "params": {"max_rows": 50}}
    with pytest.raises(DataError, match="the limit of svm is 50, .*raise model.params.max_rows"):
        run_training(TrainSpec.model_validate(_document(file_store, model=small)))
    assert Runs(file_store).all() == []
    rows = "x,y\n" + "".join(f"{i},{'a' if i else 'b'}\n" for i in range(20))
    (Path(file_store.root or "") / "rare.csv").write_text(rows)
    rare = {
        "uri": str(Path(file_store.root or "") / "rare.csv"),
        "target": "y",
        "task": "binary",
        "split": {"validation": 0.0, "test": 0.0},
    }
    with pytest.raises(DataError, match="a class has 1 row"):
        run_training(TrainSpec.model_validate(_document(file_store, model={"name": "svm"}, data=rare)))
    run = Runs(file_store).get("r")
    assert run.status == "failed"
    assert "data_invalid: svm calibrates" in str(run.error)
