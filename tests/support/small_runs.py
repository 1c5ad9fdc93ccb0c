"""Tiny runs of each kind on data that needs no cluster: specs and prepared data sets for tests of training alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from maas_ray.data.dataset import TARGET, Dataset, save_dataset
from maas_ray.data.features import Features
from maas_ray.data.prepare import prepare
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.spec import TrainSpec

NUM_COLUMNS, NUM_CLASSES = 6, 4
TEXT = "".join(f"the {i}th line of {i * i} words\n" for i in range(60))
WORDS = {"length": 8, "tokenizer": {"kind": "characters"}}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "params": {"size": 4, "dropout": 0.3}},
    "decoder": {
        "name": "decoder",
        "params": {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "dropout": 0.2},
    },
    "encoder": {"name": "encoder", "params": {"layers": 3, "width": 32, "heads": 4, "dropout": 0.2}},
}
"""`encoder` predicts masked tokens, whose number differs from row to row."""


def make_run(store: ObstoreStore, directory: Path, model: str, **changes: Any) -> tuple[TrainSpec, Dataset]:
    """A spec and its prepared data: a table for `mlp` and what is named by import path, a text for the others."""
    fields: dict[str, Any] = {
        "run": "r",
        "model": MODELS.get(model, {"name": model}),
        "data": {"uri": "rows.csv", "task": "classification"},
        "batch": {"global_size": 12},
        "objective": {"l2": 1e-3},
        "clip_norm": 1.0,
        "steps": 3,
        "storage": {"uri": store.uri},
    }
    if model in ("decoder", "encoder"):
        (directory / "text.txt").write_text(TEXT)
        task = "language_modeling" if model == "decoder" else "masked_language_modeling"
        split = {"validation": 0.1, "test": 0}
        fields["data"] = {"uri": str(directory / "text.txt"), "task": task, "split": split, "text": WORDS}
    spec = TrainSpec.model_validate({**fields, **changes})
    return spec, _table(store) if spec.data.text is None else prepare(spec.data, store)


def _table(store: ObstoreStore) -> Dataset:
    rng = np.random.default_rng(0)
    tables = {}
    for split, num_rows in (("train", 62), ("validation", 21), ("test", 0)):
        columns: dict[str, Any] = {f"c{i}": rng.normal(size=num_rows).astype(np.float32) for i in range(NUM_COLUMNS)}
        tables[split] = pa.table({**columns, TARGET: rng.integers(0, NUM_CLASSES, num_rows)})
    features = Features.model_validate(
        {
            "columns": [{"kind": "numeric", "name": f"c{i}"} for i in range(NUM_COLUMNS)],
            "task": "classification",
            "target": "t",
            "labels": [str(number) for number in range(NUM_CLASSES)],
        }
    )
    return save_dataset(store, tables, features, {}, {})
