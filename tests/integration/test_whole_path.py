"""Data to HTTP predictions with every real part: Ray Train, a store, ONNX, the registry, Ray Serve.

Images on an S3 store, a table on a directory; tests/test_readme.py runs images on a directory by `make quickstart`.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer

from maas_ray.data.prepare import open_dataset
from maas_ray.optimize.publish import export_run
from maas_ray.registry.models import Registry, Version
from maas_ray.store.fsck import fsck
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.checkpoint import list_checkpoints
from maas_ray.train.progress import Progress
from maas_ray.train.run import RunResult, run_training
from maas_ray.train.runs import Runs
from maas_ray.train.spec import TrainSpec
from maas_ray.train.trained import Evaluation, evaluate_run
from tests.conftest import RayCluster
from tests.support.paths import digits_spec, infer, served

TITANIC = Path(__file__).parents[3] / "shared" / "data" / "titanic.csv"


def _published(store: ObstoreStore, spec: TrainSpec, model: str) -> tuple[RunResult, Evaluation, Version]:
    result = run_training(spec)
    evaluation = evaluate_run(store, spec.run)
    registry = Registry(store)
    version = registry.publish(model, export_run(store, spec.run).bundle_id)
    registry.promote(model, version.version)
    return result, evaluation, version


def test_digits_go_through_an_s3_store_and_are_predicted_over_http_as_well_as_in_torch(
    s3_endpoint: str, ray_cluster: RayCluster
) -> None:
    storage = StorageSpec(uri="s3://maas/whole-path", endpoint=s3_endpoint)
    store = open_store(storage)
    spec = digits_spec(storage, "digits")
    reports: list[Progress] = []
    result = run_training(spec, on_progress=reports.append)
    assert reports[-1].step == reports[-1].total_steps == result.step
    assert list_checkpoints(store, "digits")[-1] == result.step
    evaluation = evaluate_run(store, "digits")
    assert evaluation.metrics["accuracy"] > 0.9

    registry = Registry(store)
    version = registry.publish("digits", export_run(store, "digits").bundle_id)
    registry.promote("digits", version.version)
    lineage = registry.info(version).lineage
    assert (lineage.run, lineage.step, lineage.data_digest) == ("digits", result.step, result.data_digest)
    assert lineage.spec_digest == Runs(store).get("digits").spec.digest()

    test = open_dataset(store, result.data_digest).read("test")
    images = test.columns[0]
    with served(storage, "digits", ray_cluster.http_port) as url:
        tensor = {"name": "image", "datatype": "FP32", "shape": list(images.shape), "data": images.ravel().tolist()}
        outputs, headers = infer(url, [tensor])
    assert (headers["x-maas-run"], headers["x-maas-version"]) == ("digits", str(version.version))
    assert np.mean(np.array(outputs["class"]) == test.target) == pytest.approx(evaluation.metrics["accuracy"])
    checked = fsck(store)
    assert (checked.problems, checked.orphans, checked.foreign) == ([], [], [])


def _titanic() -> tuple[list[dict[str, str]], dict[str, Any]]:
    with TITANIC.open(newline="") as file:
        rows = list(csv.DictReader(file))
    features = ["pclass", "sex", "age", "sibsp", "fare", "embarked", "deck"]
    cleaning = {
        "numeric": {"missing": "median"},
        "categorical": {"missing": "most_frequent"},
        "columns": {"deck": {"missing": "constant", "constant": "none"}},
    }
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


def test_raw_rows_with_gaps_and_strings_are_predicted_over_http_as_well_as_in_torch(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    rows, data = _titanic() if TITANIC.exists() else _breast_cancer()
    path = tmp_path / "rows.csv"
    for number, row in enumerate(rows):
        row["split"] = "test" if number % 4 == 0 else "train"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*data["features"], data["target"], "split"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    storage = StorageSpec(uri=f"file://{tmp_path}/store")
    store = open_store(storage)
    spec = digits_spec(
        storage, "table", data={"uri": str(path), "split": {"column": "split"}, **data}, objective={"loss": "bce"}
    )
    result, evaluation, _ = _published(store, spec, "table")
    assert evaluation.metrics["accuracy"] > 0.7
    report = open_dataset(store, result.data_digest).report
    assert sum(column["missing"] for column in report["columns"].values()) > 50

    held_out = [row for row in rows if row["split"] == "test"]
    registry = Registry(store)
    signature = registry.info(registry.resolve("table")).signature
    inputs = [
        {
            "name": tensor.name,
            "datatype": tensor.datatype,
            "shape": [len(held_out), 1],
            "data": [_raw(row[tensor.name], tensor.datatype) for row in held_out],
        }
        for tensor in signature.inputs
    ]
    with served(storage, "table", ray_cluster.http_port) as url:
        outputs, _ = infer(url, inputs)
    labels = registry.info(registry.resolve("table")).labels or ()
    predicted = [labels[code] for code in outputs["class"]]
    accuracy = np.mean([label == row[data["target"]] for label, row in zip(predicted, held_out, strict=True)])
    assert accuracy == pytest.approx(evaluation.metrics["accuracy"])


def _raw(text: str, datatype: str) -> Any:
    """A csv cell as a caller would send it: a gap is a null."""
    if text == "":
        return None
    return text if datatype == "BYTES" else int(text) if datatype == "INT64" else float(text)
