"""scikit-learn's data as committed data sets: images, a table with gaps and strings, numbers."""

from typing import Any

import numpy as np
import pyarrow as pa
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.features import CategoricalColumn, Column, Features, NumericColumn, TensorColumn
from maas_ray.data.stored.dataset import TARGET, Dataset, save_dataset
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs
from maas_ray.train.spec.train import TrainSpec

TASKS = ("classification", "binary", "regression")


def build_dataset(store: ObstoreStore, task: str) -> Dataset:
    """Every fourth row is held out; there is a small validation split for classes."""
    fields, target, features = {"classification": _digits, "binary": _mixed, "regression": _numbers}[task]()
    table = pa.table(
        [*(array for _, array in fields), pa.array(target)],
        schema=pa.schema([*(field for field, _ in fields), pa.field(TARGET, pa.from_numpy_dtype(target.dtype))]),
    )
    number = np.arange(table.num_rows)
    rows = {"test": number % 4 == 0, "validation": number % 20 == 1, "train": (number % 4 != 0) & (number % 20 != 1)}
    return save_dataset(store, {split: table.filter(pa.array(mask)) for split, mask in rows.items()}, features, {}, {})


def create_run(store: ObstoreStore, dataset: Dataset, model: dict[str, Any], run: str = "r") -> TrainSpec:
    """A run as `run_training` creates it, without a cluster."""
    spec = TrainSpec.model_validate(
        {
            "run": run,
            "model": model,
            "data": {"uri": "rows.csv", "target": "y", "task": dataset.features.task},
            "storage": {"uri": store.uri},
            "seed": 3,
        }
    )
    Runs(store).create(spec, dataset.digest, "0123abc")
    return spec


Fields = list[tuple[pa.Field, pa.Array]]


def _digits() -> tuple[Fields, np.ndarray, Features]:
    images, target = load_digits(return_X_y=True)
    fields = [tensor_field("image", images.reshape(-1, 8, 8).astype(np.uint8)[:900])]
    column = TensorColumn(name="image", datatype="UINT8", shape=(8, 8), shift=(4.88,), scale=(6.02,))
    features = Features(columns=(column,), task="classification", target="y", labels=tuple("0123456789"))
    return fields, target[:900].astype(np.int64), features


def _mixed() -> tuple[Fields, np.ndarray, Features]:
    """Numbers with gaps, text with gaps, whole numbers; one column has the name of an output."""
    values, target = load_breast_cancer(return_X_y=True)
    generator = np.random.default_rng(0)
    fields: Fields = []
    columns: list[Column] = []
    for i, name in enumerate(("radius", "probability", "class")):
        column = values[:, i].astype(np.float32)
        fill, shift, scale = float(np.median(column)), float(column.mean()), float(column.std())
        column[generator.random(len(column)) < 0.2] = np.nan
        fields.append((pa.field(name, pa.float32()), pa.array(column)))
        columns.append(NumericColumn(name=name, fill=fill, shift=shift, scale=scale))
    size = np.where(values[:, 3] > 600, "large", "small").astype(object)
    size[generator.random(len(size)) < 0.2] = ""
    fields.append((pa.field("size", pa.string()), pa.array(size.tolist())))
    columns.append(CategoricalColumn(name="size", categories=("large", "small"), fill=1))
    fields.append((pa.field("grade", pa.int64()), pa.array((values[:, 6] * 10).astype(np.int64))))
    columns.append(CategoricalColumn(name="grade", datatype="INT64", categories=(0, 1, 2), encoding="ordinal"))
    features = Features(columns=tuple(columns), task="binary", target="y", labels=("no", "yes"))
    return fields, target.astype(np.float32), features


def _numbers() -> tuple[Fields, np.ndarray, Features]:
    """A target in the hundred thousands, such as a price."""
    values, target = load_diabetes(return_X_y=True)
    names = [f"x{i}" for i in range(values.shape[1])]
    fields: Fields = [
        (pa.field(name, pa.float32()), pa.array(values[:, i].astype(np.float32))) for i, name in enumerate(names)
    ]
    columns = tuple(NumericColumn(name=name, scale=0.047) for name in names)
    return fields, (target * 1000).astype(np.float32), Features(columns=columns, task="regression", target="y")
