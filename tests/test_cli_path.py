"""The whole path by commands, on the session's cluster: raw rows with gaps and strings go in, predictions come out."""

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from maas_ray.cli.app import app
from tests.conftest import RayCluster


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    random.seed(0)
    rows = [(random.uniform(0, 1) if index % 7 else "", random.choice("ab")) for index in range(200)]
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["size", "kind", "label"])
        writer.writerows([size, kind, "yes" if kind == "a" else "no"] for size, kind in rows)
    document = {
        "run": "path",
        "model": {"name": "mlp"},
        "data": {
            "uri": str(tmp_path / "rows.csv"),
            "target": "label",
            "task": "classification",
            "cleaning": {"numeric": {"missing": "mean"}},
        },
        "optimizer": {"lr": 0.01},
        "batch": {"global_size": 32},
        "epochs": 20,
    }
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_train_publish_serve_and_predict(ray_cluster: RayCluster, spec: Path, tmp_path: Path):
    environment = {"MAAS_RAY_HOME": str(ray_cluster.state_dir), "MAAS_RAY_STORE": f"file://{tmp_path}/store"}

    def call(*arguments: str) -> Any:
        result = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    trained = call("train", str(spec), "--set", f"storage.uri=file://{tmp_path}/store")
    assert trained["run"] == "path"
    again = CliRunner().invoke(
        app, ["train", str(spec), "--set", f"storage.uri=file://{tmp_path}/store"], env=environment
    )
    assert again.exit_code == 1
    assert "error[conflict]" in again.stderr
    assert [run["status"] for run in call("runs")] == ["finished"]
    assert call("evaluate", "path")["metrics"]["accuracy"] == 1.0
    published = call("publish", "path", "--name", "kinds", "--promote", "production")
    assert published["version"] == 1

    served = tmp_path / "serve.yaml"
    served.write_text(
        yaml.safe_dump({"pools": [{"name": "cli", "models": [{"name": "kinds"}], "route_prefix": "/cli"}]})
    )
    pools = call("serve", str(served), "--set", f"storage.uri=file://{tmp_path}/store")
    try:
        assert pools["url"] == f"http://127.0.0.1:{ray_cluster.http_port}"
        answer = call("predict", "kinds", "--input", str(tmp_path / "rows.csv"), "--url", f"{pools['url']}/cli")
        with (tmp_path / "rows.csv").open() as file:
            wanted = [row["label"] for row in csv.DictReader(file)]
        classes = [prediction["class"] for prediction in answer["predictions"]]
        assert {(label, code) for label, code in zip(wanted, classes, strict=True)} == {("no", 0), ("yes", 1)}
        assert answer["headers"]["x-maas-run"] == "path"
        missing = CliRunner().invoke(
            app, ["predict", "other", "--input", str(tmp_path / "rows.csv"), "--url", f"{pools['url']}/cli"]
        )
        assert missing.exit_code == 1
        assert "error[not_found]" in missing.stderr
    finally:
        call("unserve", "cli")
    assert call("fsck")["problems"] == []
