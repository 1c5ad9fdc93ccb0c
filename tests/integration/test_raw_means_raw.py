"""Files that a model was trained on are predicted by `maas-ray predict` as `evaluate` scores them; so are images and texts.

Replicas without Ray Serve answer here: training takes long enough.
"""

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from maas_ray.cli.app import app
from maas_ray.client import Client
from maas_ray.data.prepare import open_dataset
from maas_ray.optimize.publish import export_run
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.validation.evaluate_run import evaluate_run
from tests.serve.conftest import Server, app_spec, publish, serve_app

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _train(root: Path, run: str, data: dict[str, Any], **fields: Any) -> ObstoreStore:
    storage = StorageSpec(uri=f"file://{root}/store")
    spec = TrainSpec.model_validate(
        {
            "run": run,
            "model": {"name": "mlp", "params": {"size": 1}},
            "data": {"task": "classification", "split": {"validation": 0, "test": 0}, **data},
            "epochs": 3,
            "optimizer": {"lr": 0.01},
            "storage": storage.model_dump(),
            **fields,
        }
    )
    run_training(spec)
    return open_store(storage)


@contextmanager
def _served(store: ObstoreStore, run: str) -> Iterator[Server]:
    publish(store, run, export_run(store, run).bundle_id)
    yield from serve_app(store, app_spec(store, run, limits={"timeout_s": 60}), "protocol")


def _predict(server: Server, model: str, path: Path) -> dict[str, Any]:
    arguments = ["predict", model, "--input", str(path), "--url", server.url, "--timeout-s", "60"]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    document: dict[str, Any] = json.loads(result.stdout)
    shown = CliRunner().invoke(app, arguments).stdout
    assert document["predictions"][0]["class"] in shown
    return document


def _accuracy(document: dict[str, Any], wanted: list[str]) -> float:
    return float(np.mean([one["class"] == label for one, label in zip(document["predictions"], wanted, strict=True)]))


def test_a_table_as_r_writes_it_is_predicted_as_evaluate_scores_it(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    for i in range(400):
        label = "good" if draw.random() < 0.5 else "bad"
        number = f"{draw.gauss(1.0 if label == 'good' else -1.0, 2):.3f}" if i % 11 else "NA"
        country = ["DE", "FR", "NA", ""][i % 4]
        flag = ["TRUE", "FALSE"][draw.random() < (0.7 if label == "good" else 0.3)]
        rows.append((number, "NA" if i % 13 == 0 else flag, country, draw.randint(1, 3), label))
    table = tmp_path / "m.csv"
    table.write_text("\n".join(["n;flag;country;level;y", *(";".join(map(str, row)) for row in rows)]) + "\n")
    cleaning = {
        "numeric": {"missing": "mean"},
        "categorical": {"missing": "most_frequent"},
        "columns": {"level": {"cast": "category"}},
    }
    data = {"uri": str(table), "target": "y", "delimiter": ";", "cleaning": cleaning}
    store = _train(tmp_path, "table", data)
    evaluation = evaluate_run(store, "table", "train")
    with _served(store, "table") as server:
        document = _predict(server, "table", table)
        assert _accuracy(document, [row[-1] for row in rows]) == pytest.approx(evaluation.metrics["accuracy"])
        assert set(document["predictions"][0]["probabilities"]) == {"good", "bad"}
        with Client(server.url, timeout_s=60) as client:
            found = client.predict("table", table)
            nulls = client.predict("table", [{"n": None, "flag": None, "country": None, "level": None}])
        assert [one["class"] for one in found.named_rows()] == [one["class"] for one in document["predictions"]]
        assert np.isfinite(nulls.outputs["probabilities"]).all()


@pytest.mark.fault
def test_image_files_are_predicted_as_evaluate_scores_them(tmp_path: Path) -> None:
    random_numbers = np.random.default_rng(0)
    root = tmp_path / "pictures"
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(60):
        name = ("left", "right")[i % 2]
        pixels = random_numbers.integers(0, 100, (12, 9, 3)).astype(np.uint8)
        pixels[:, :4] += np.uint8(120 * (name == "left"))
        pixels[:, 5:] += np.uint8(120 * (name == "right"))
        (root / name).mkdir(parents=True, exist_ok=True)
        stored = Image.fromarray(np.rot90(pixels)) if i % 3 else Image.fromarray(pixels)
        stored.save(root / name / f"{i:02d}.png", **({"exif": exif} if i % 3 else {}))
    (root / "Thumbs.db").write_bytes(b"junk")
    fields = {
        "model": {"name": "convnet", "params": {"size": 1}},
        "augmentation": {"flip": 0.0, "crop": 1, "mixup": 0.2},
    }
    store = _train(tmp_path, "pictures", {"uri": str(root)}, **fields)
    evaluation = evaluate_run(store, "pictures", "train")
    with _served(store, "pictures") as server:
        document = _predict(server, "pictures", root)
        labels = [name.partition("/")[0] for name in document["files"]]
        assert _accuracy(document, labels) == pytest.approx(evaluation.metrics["accuracy"])
        one = _predict(server, "pictures", root / "left" / "00.png")
        assert one["predictions"][0]["probabilities"] == pytest.approx(
            document["predictions"][document["files"].index("left/00.png")]["probabilities"], rel=1e-5
        )
        dataset = open_dataset(store, _data_digest(store, "pictures"))
        with Client(server.url, timeout_s=60) as client:
            pixels = dataset.read("train").columns[0]
            plain = client.predict("pictures", {"image": pixels})
        assert sorted(plain.outputs["class"].tolist()) == sorted(
            ["left", "right"].index(one["class"]) for one in document["predictions"]
        )


def _data_digest(store: ObstoreStore, run: str) -> str:
    from maas_ray.train.records.runs import Runs

    return Runs(store).get(run).data_digest


@pytest.mark.fault
def test_texts_are_predicted_as_evaluate_scores_them(tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = []
    for _ in range(200):
        label = draw.choice(["praise", "complaint"])
        words = draw.choices(["good", "fine", "great"] if label == "praise" else ["bad", "poor", "awful"], k=3)
        rows.append((" ".join([*words, draw.choice(["service", "food, really", "größe"])]), label))
    table = tmp_path / "texts.csv"
    table.write_text("text,y\n" + "".join(f'"{text}",{label}\n' for text, label in rows))
    data = {"uri": str(table), "target": "y", "text": {"seq_len": 12, "tokenizer": {"vocab_size": 400}}}
    store = _train(tmp_path, "texts", data, model={"name": "encoder", "params": {"size": 1}})
    evaluation = evaluate_run(store, "texts", "train")
    with _served(store, "texts") as server:
        document = _predict(server, "texts", table)
        assert _accuracy(document, [label for _, label in rows]) == pytest.approx(evaluation.metrics["accuracy"])
        with Client(server.url, timeout_s=60) as client:
            found = client.predict("texts", [{"text": text} for text, _ in rows])
        assert [one["class"] for one in found.named_rows()] == [one["class"] for one in document["predictions"]]
