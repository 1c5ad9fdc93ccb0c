"""The whole path by commands, for a table with gaps and strings: raw rows go over HTTP, and score as in torch."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_breast_cancer
from typer.testing import CliRunner, Result

from maas_ray.cli.app import app
from maas_ray.data.prepare import open_dataset
from maas_ray.registry.models import Registry
from maas_ray.store.objects import open_store
from tests.conftest import RayCluster
from tests.support.paths import infer

TITANIC = Path(__file__).parents[3] / "shared" / "data" / "titanic.csv"


def _titanic() -> tuple[list[dict[str, str]], dict[str, Any]]:
    with TITANIC.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cleaning = {
        "numeric": {"missing": "median"},
        "categorical": {"missing": "most_frequent"},
        "columns": {"deck": {"missing": "constant", "constant": "none"}},
    }
    features = ["pclass", "sex", "age", "sibsp", "fare", "embarked", "deck"]
    return rows, {"target": "survived", "features": features, "task": "binary", "cleaning": cleaning}


def _breast_cancer() -> tuple[list[dict[str, str]], dict[str, Any]]:
    """A package's real data with a string column made of a number, and values taken out."""
    data = load_breast_cancer()
    names = [name.replace(" ", "_") for name in data.feature_names[:6]]
    generator = np.random.default_rng(0)
    rows = []
    for values, target in zip(data.data, data.target, strict=True):
        row = {name: "" if generator.random() < 0.1 else str(value) for name, value in zip(names, values, strict=False)}
        row["size"] = "" if generator.random() < 0.1 else "large" if values[3] > 600 else "small"
        rows.append({**row, "malignant": str(1 - target)})
    cleaning = {"numeric": {"missing": "mean"}, "categorical": {"missing": "most_frequent"}}
    return rows, {"target": "malignant", "features": [*names, "size"], "task": "binary", "cleaning": cleaning}


def _write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def _raw(text: str, datatype: str) -> Any:
    """A csv cell as a caller would send it: a gap is a null."""
    if text == "":
        return None
    return text if datatype == "BYTES" else int(text) if datatype == "INT64" else float(text)


def test_a_table_goes_from_csv_to_predictions_of_raw_rows(ray_cluster: RayCluster, tmp_path: Path) -> None:
    rows, data = _titanic() if TITANIC.exists() else _breast_cancer()
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 4 == 0 else "train"
    held_out = [row for row in rows if row["split"] == "test"]
    _write(tmp_path / "rows.csv", rows, [*data["features"], data["target"], "split"])
    _write(tmp_path / "held_out.csv", held_out, data["features"])
    store_uri = f"file://{tmp_path}/store"
    train = {
        "run": "table",
        "model": {"name": "mlp", "params": {"size": 1, "dropout": 0.2}},
        "data": {"uri": str(tmp_path / "rows.csv"), "split": {"column": "split"}, **data},
        "optimizer": {"lr": 0.01},
        "epochs": 8,
        "workers": {"count": 2},
        "storage": {"uri": store_uri},
    }
    serve = {"pools": [{"name": "cli", "models": [{"name": "table"}], "route_prefix": "/cli"}]}
    for name, document in (("train", train), ("serve", serve)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    environment = {"MAAS_RAY_HOME": str(ray_cluster.state_dir), "MAAS_RAY_STORE": store_uri}

    def call(*arguments: str) -> Any:
        result: Result = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refused(*arguments: str) -> str:
        result: Result = CliRunner().invoke(app, [*arguments], env=environment)
        assert result.exit_code == 1
        return result.stderr

    trained = call("train", str(tmp_path / "train.yaml"))
    assert trained["run"] == "table"
    report = open_dataset(open_store(store_uri), trained["data_digest"]).report
    assert sum(column["missing"] for column in report["columns"].values()) > 50
    assert "error[conflict]" in refused("train", str(tmp_path / "train.yaml"))
    assert [run["status"] for run in call("runs")] == ["finished"]
    in_torch = call("evaluate", "table")["metrics"]["accuracy"]
    assert in_torch > 0.7
    published = call("publish", "table", "--name", "table", "--promote", "production")
    assert published["version"] == 1

    pools = call("serve", str(tmp_path / "serve.yaml"), "--set", f"storage.uri={store_uri}")
    try:
        assert pools["url"] == f"http://127.0.0.1:{ray_cluster.http_port}"
        registry = Registry(open_store(store_uri))
        info = registry.info(registry.resolve("table"))
        inputs = [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": [len(held_out), 1],
                "data": [_raw(row[tensor.name], tensor.datatype) for row in held_out],
            }
            for tensor in info.signature.inputs
        ]
        outputs, headers = infer(f"{pools['url']}/cli/v2/models/table/infer", inputs)
        assert (headers["x-maas-run"], headers["x-maas-version"]) == ("table", "1")
        predicted = [(info.labels or ())[code] for code in outputs["class"]]
        over_http = np.mean([label == row[data["target"]] for label, row in zip(predicted, held_out, strict=True)])
        assert over_http == pytest.approx(in_torch)

        answer = call("predict", "table", "--input", str(tmp_path / "held_out.csv"), "--url", f"{pools['url']}/cli")
        assert [row["class"] for row in answer["predictions"]] == outputs["class"]
        unknown = refused("predict", "other", "--input", str(tmp_path / "rows.csv"), "--url", f"{pools['url']}/cli")
        assert "error[not_found]" in unknown
    finally:
        call("unserve", "cli")
    checked = call("fsck")
    assert (checked["problems"], checked["orphans"], checked["foreign"]) == ([], [], [])
