"""Texts with a target: the first tokens of each, padded; the tokenizer is learned from the training split alone."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.prepare import prepare
from maas_ray.data.spec.data import DataSpec
from maas_ray.decoding.tokenizer import Tokenizer
from maas_ray.errors import BundleError, DataError, SpecError
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import check_parity
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore, open_store

ROWS = [
    {"body": "good", "mood": "up", "part": "train"},
    {"body": "so bad it hurts", "mood": "down", "part": "train"},
    {"body": "", "mood": "down", "part": "train"},
    {"body": None, "mood": "up", "part": "train"},
    {"body": "none", "mood": None, "part": "train"},
    {"body": "zz", "mood": "down", "part": "validation"},
]
FIELDS: dict[str, Any] = {
    "task": "classification",
    "target": "mood",
    "split": {"column": "part"},
    "text": {"seq_len": 6, "field": "body", "tokenizer": {"kind": "characters"}},
}


@pytest.fixture
def store(tmp_path: Path) -> ObstoreStore:
    return open_store(str(tmp_path / "store"))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_a_text_becomes_its_first_tokens_filled_up(store: ObstoreStore, path: Path) -> None:
    dataset = prepare(parse_spec(DataSpec, {"uri": str(path), **FIELDS}), store)
    column = dataset.features.tokens
    assert column is not None
    assert dataset.features.row.shape == (6,)
    assert dataset.features.labels == ("down", "up")
    assert dataset.features.num_outputs == 2
    assert dataset.num_rows == {"train": 2, "validation": 1, "test": 0}
    assert dataset.report == {
        "rows_read": 6,
        "rows_dropped": {"target_missing": 1, "value_missing": 2},
        "texts_cut": 1,
    }
    tokenizer = Tokenizer(dataset.tokenizer())
    loader = Loader.over(open_rows(dataset, "train"), seed=0, global_batch=2, rank=0, world=1)
    batch = loader.load(0, 2)[0]
    shown = {tokenizer.decode(row): int(code) for row, code in zip(batch.columns[0], batch.target, strict=True)}
    assert shown == {"good<|pad|><|pad|>": 1, "so bad": 0}
    held_out = open_rows(dataset, "validation").take(np.array([0]), np.array([0])).columns
    assert tokenizer.decode(held_out[0][0]) == "<|unknown|>" * 2 + "<|pad|>" * 4
    assert Preprocess(dataset.features)(*held_out).dtype == torch.int64


class _Bag(nn.Module):
    def __init__(self, vocab_size: int, num_outputs: int) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab_size, num_outputs)

    def forward(self, token_ids: Tensor) -> Tensor:
        logits: Tensor = self.table(token_ids).mean(dim=1)
        return logits


@pytest.mark.fault
def test_a_classifier_of_texts_is_exported_over_token_ids(store: ObstoreStore, path: Path) -> None:
    dataset = prepare(parse_spec(DataSpec, {"uri": str(path), **FIELDS}), store)
    net = _Bag(dataset.features.row.vocab_size or 0, 2)
    graph, signature = export(net, dataset.features)
    assert [(one.name, one.datatype, one.shape) for one in signature.inputs] == [("body", "INT64", (-1, 6))]
    report = check_parity(net, dataset.features, graph, dataset.read("train").columns)
    assert report["passed"]


def test_a_model_with_logits_per_token_is_not_exported(store: ObstoreStore, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc " * 50)
    fields = {"task": "language_modeling", "text": {"seq_len": 4}}
    dataset = prepare(parse_spec(DataSpec, {"uri": str(tmp_path / "a.txt"), **fields}), store)
    with pytest.raises(
        BundleError, match="no signature for logits per token, which a model of the task language_modeling has"
    ):
        export(nn.Embedding(300, 300), dataset.features)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"features": ["other"]}, "a text must be the only feature"),
        ({"cleaning": {"drop": ["x"]}}, "no effect on a text"),
        ({"text": {"seq_len": 6, "stride": 2}}, r"text\.stride cannot be used"),
    ],
)
def test_fields_without_effect_are_rejected(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        parse_spec(DataSpec, {"uri": "a.jsonl", **FIELDS, **fields})


def test_a_split_without_a_text_is_refused(store: ObstoreStore, tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(json.dumps({**row, "body": row["body"] if i < 5 else ""}) for i, row in enumerate(ROWS)))
    with pytest.raises(DataError, match="the validation split"):
        prepare(parse_spec(DataSpec, {"uri": str(path), **FIELDS}), store)
