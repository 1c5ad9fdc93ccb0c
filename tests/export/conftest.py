"""Small trained nets with the features and raw rows that they were trained on."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from maas_ray.bundle.format import Signature
from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.export.onnx_export import export
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.spec.optim import ObjectiveSpec


@dataclass(frozen=True)
class Case:
    """A trained net, what it was trained on, and its graph."""

    features: Features
    rows: list[np.ndarray]
    target: np.ndarray
    net: nn.Module
    graph: bytes
    signature: Signature


def _digits() -> tuple[Features, list[np.ndarray], np.ndarray, ModelSpec]:
    images, target = load_digits(return_X_y=True)
    column = TensorColumn(name="image", datatype="UINT8", shape=(8, 8), shift=(4.88,), scale=(6.02,))
    features = Features(columns=(column,), task="classification", target="digit", labels=tuple("0123456789"))
    spec = ModelSpec(name="convnet", params={"size": 1, "dropout": 0.1})
    return features, [images.reshape(-1, 8, 8).astype(np.uint8)], target, spec


def _mixed() -> tuple[Features, list[np.ndarray], np.ndarray, ModelSpec]:
    """Numbers with gaps, strings and integers under names that ONNX or a reader of names could stumble over."""
    generator = np.random.default_rng(0)
    num_rows = 200
    age = generator.normal(30, 12, (num_rows, 1)).astype(np.float32)
    port = generator.choice(np.array(["S", "C", "Québec", "new york"], object), (num_rows, 1))
    size = generator.choice(np.array([1, 2, 30]), (num_rows, 1))
    fare = generator.exponential(30, (num_rows, 1)).astype(np.float32)
    level = generator.choice(np.array(["low", "mid", "high"], object), (num_rows, 1))
    target = ((age[:, 0] > 30).astype(np.int64) + (port[:, 0] == "S") + (size[:, 0] == 30)) % 3
    age[generator.random(num_rows) < 0.2] = np.nan
    port[generator.random(num_rows) < 0.2] = ""
    features = Features(
        columns=(
            NumericColumn(name="age in years", fill=29.5, shift=30.1, scale=12.2),
            CategoricalColumn(name="port.of.départ", categories=("C", "Québec", "S", "new york"), fill=2),
            CategoricalColumn(name="class", datatype="INT64", categories=(1, 2, 30)),
            NumericColumn(name="net.1.weight", shift=28.0, scale=31.0),
            CategoricalColumn(name="value_3", categories=("high", "low", "mid"), encoding="ordinal"),
        ),
        task="classification",
        target="outcome",
        labels=("a", "b", "c"),
    )
    spec = ModelSpec(name="mlp", params={"size": 1, "norm": "layer", "activation": "gelu"})
    return features, [age, port, size, fare, level], target, spec


def _binary() -> tuple[Features, list[np.ndarray], np.ndarray, ModelSpec]:
    _, rows, target, _ = _mixed()
    columns = (
        NumericColumn(name="a", fill=0.0, shift=30.0, scale=12.0),
        TensorColumn(name="b", shape=(3,), fill=0.5, shift=(0.0, 1.0, 2.0), scale=(1.0, 2.0, 3.0)),
    )
    features = Features(columns=columns, task="binary", target="t", labels=("no", "yes"))
    b = np.random.default_rng(1).normal(size=(len(target), 3)).astype(np.float32)
    return features, [rows[0], b], (target > 0).astype(np.float32), ModelSpec(name="mlp", params={"norm": "batch"})


def _regression() -> tuple[Features, list[np.ndarray], np.ndarray, ModelSpec]:
    """A target in the hundred thousands, such as a price."""
    x, y = load_diabetes(return_X_y=True)
    columns = tuple(NumericColumn(name=f"x{i}", scale=0.047) for i in range(x.shape[1]))
    features = Features(columns=columns, task="regression", target="progression")
    rows = [x[:, i : i + 1].astype(np.float32) for i in range(x.shape[1])]
    return (
        features,
        rows,
        (y * 1000).astype(np.float32),
        ModelSpec(name="mlp", params={"size": 1, "activation": "silu"}),
    )


CASES: dict[str, Callable[[], Any]] = {"digits": _digits, "mixed": _mixed, "binary": _binary, "regression": _regression}


def train(net: nn.Module, features: Features, rows: list[np.ndarray], target: np.ndarray) -> None:
    loss = build_loss(ObjectiveSpec(), features.task)
    preprocess = Preprocess(features)
    columns = [torch.from_numpy(column) for column in encode_columns(features, rows)]
    wanted = torch.from_numpy(target)
    optimizer = torch.optim.Adam(net.parameters(), 1.0 if features.task == "regression" else 5e-3)
    for step in range(30):
        ids = torch.arange(step * 64, step * 64 + 64) % len(wanted)
        losses = loss(net(preprocess(*(column[ids] for column in columns))), wanted[ids])
        optimizer.zero_grad()
        losses.mean().backward()
        optimizer.step()


@pytest.fixture(scope="session")
def cases() -> Callable[[str], Case]:
    """Builds a case on first use, and keeps it."""
    built: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in built:
            features, rows, target, spec = CASES[name]()
            torch.manual_seed(0)
            net = build_model(spec, features.row, features.num_outputs)
            train(net, features, rows, target)
            graph, signature = export(net, features)
            built[name] = Case(features, rows, target, net, graph, signature)
        return built[name]

    return get
