"""Tiny runs of each kind on data that needs no cluster: specs and prepared data sets for tests of training alone."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from sklearn.datasets import load_digits

from maas_ray.data.prepare import prepare
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import TARGET, WEIGHT, Dataset, save_dataset
from maas_ray.errors import TrainingFailed
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec

NUM_COLUMNS, NUM_CLASSES = 6, 4
TEXT = "".join(f"the {i}th line of {i * i} words\n" for i in range(60))
WORDS = {"seq_len": 8, "tokenizer": {"kind": "characters"}}
MODELS: dict[str, dict[str, Any]] = {
    "mlp": {"name": "mlp", "params": {"size": 4, "dropout": 0.3}},
    "decoder": {
        "name": "decoder",
        "params": {"layers": 4, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "dropout": 0.2},
    },
    "encoder": {"name": "encoder", "params": {"layers": 3, "width": 32, "heads": 4, "dropout": 0.2}},
    "llama": {
        "name": "hf:LlamaForCausalLM",
        "params": {
            "config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 4,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "attention_dropout": 0.2,
            }
        },
    },
    "bert": {
        "name": "hf:BertForMaskedLM",
        "params": {
            "config": {
                "hidden_size": 16,
                "intermediate_size": 24,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
            }
        },
    },
}
"""`encoder` and `bert` predict masked tokens, whose number differs from row to row."""
TASKS = {
    "decoder": "language_modeling",
    "llama": "language_modeling",
    "encoder": "masked_language_modeling",
    "bert": "masked_language_modeling",
}


def make_run(store: ObstoreStore, directory: Path, model: str, **changes: Any) -> tuple[TrainSpec, Dataset]:
    """A spec and its prepared data: a table for `mlp` and what is named by import path, a text for the others."""
    fields: dict[str, Any] = {
        "run": "r",
        "model": MODELS.get(model, {"name": model}),
        "data": {"uri": "rows.csv", "task": "classification"},
        "batch": {"global_size": 12},
        "objective": {"l2": 1e-3},
        "max_grad_norm": 1.0,
        "steps": 3,
        "storage": {"uri": store.uri},
    }
    if model in TASKS:
        text = directory / "text.txt"
        if not text.exists():  # other ranks may be reading it
            text.write_text(TEXT)
        task = TASKS[model]
        split = {"validation": 0.1, "test": 0}
        fields["data"] = {"uri": str(text), "task": task, "split": split, "text": WORDS}
    spec = TrainSpec.model_validate({**fields, **changes})
    return spec, _table(store, spec.data.weight) if spec.data.text is None else prepare(spec.data, store)


def make_digits(store: ObstoreStore, **changes: Any) -> tuple[TrainSpec, Dataset]:
    """Real scans as 64 numbers each, and an mlp that can learn them."""
    images, labels = load_digits(return_X_y=True)
    rows = (images / 16).astype(np.float32)
    tables = {}
    for split, taken in (("train", slice(0, 1400)), ("validation", slice(1400, 1797)), ("test", slice(0, 0))):
        columns: dict[str, Any] = {f"c{i}": rows[taken, i] for i in range(rows.shape[1])}
        tables[split] = pa.table({**columns, TARGET: labels[taken]})
    columns = [{"kind": "numeric", "name": f"c{i}"} for i in range(rows.shape[1])]
    fields = {"columns": columns, "task": "classification", "target": "t", "labels": [str(i) for i in range(10)]}
    spec = TrainSpec.model_validate(
        {
            "run": "r",
            "model": {"name": "mlp", "params": {"size": 1}},
            "data": {"uri": "sklearn:digits", "task": "classification"},
            "storage": {"uri": store.uri},
            **changes,
        }
    )
    return spec, save_dataset(store, tables, Features.model_validate(fields), {}, {})


def train_here(spec: TrainSpec, dataset: Dataset, lr: float, *, steps: int) -> float:
    """The loss of the last step at one rate, in this process; infinite if it was NaN."""
    changes = {"epochs": None, "steps": steps, "optimizer": spec.optimizer.model_copy(update={"lr": lr})}
    spec = spec.model_copy(update=changes)
    coordinates, num_rows = RankCoordinates(MeshLayout(), None), dataset.num_rows["train"]
    state = build_train_state(spec, dataset.features, num_rows, coordinates, torch.device("cpu"))
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    state.train()
    try:
        for step in range(steps):
            share, _ = train_step(plan, state, loader, step)
            loss = mean_loss(state, share, step)
    except TrainingFailed:
        return math.inf
    return loss


def _table(store: ObstoreStore, weight: str | None) -> Dataset:
    rng = np.random.default_rng(0)
    tables = {}
    for split, num_rows in (("train", 62), ("validation", 21), ("test", 0)):
        columns: dict[str, Any] = {f"c{i}": rng.normal(size=num_rows).astype(np.float32) for i in range(NUM_COLUMNS)}
        columns[TARGET] = rng.integers(0, NUM_CLASSES, num_rows)
        if weight is not None:
            columns[WEIGHT] = rng.exponential(size=num_rows).astype(np.float32) * (rng.random(num_rows) > 0.2)
        tables[split] = pa.table(columns)
    features = Features.model_validate(
        {
            "columns": [{"kind": "numeric", "name": f"c{i}"} for i in range(NUM_COLUMNS)],
            "task": "classification",
            "target": "t",
            "weight": weight,
            "labels": [str(number) for number in range(NUM_CLASSES)],
        }
    )
    return save_dataset(store, tables, features, {}, {})
