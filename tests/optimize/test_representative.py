"""The sample of an exported bundle: accepted by its graph, generated from statistics, deterministic."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import Bundle, load_bundle
from maas_ray.bundle.sample import read_sample
from maas_ray.data.spec.features import Features, NumericColumn, TensorColumn, TokensColumn
from maas_ray.export.onnx_export import build_signature
from maas_ray.optimize.publish import export_run
from maas_ray.optimize.representative import MAX_ELEMENTS, representative_sample
from maas_ray.store.objects import ObstoreStore
from tests.export.conftest import Case
from tests.optimize.test_publish import run
from tests.support.onnx_models import make_bundle

__all__ = ["run"]


@pytest.mark.parametrize("name", ["digits", "mixed", "binary", "regression"])
def test_the_graph_takes_them(cases: Callable[[str], Case], name: str) -> None:
    case = cases(name)
    sample = representative_sample(case.features, case.signature)
    assert sample is not None
    info = make_bundle().info.model_copy(update={"signature": case.signature})
    engine = Engine(Bundle("b", info, case.graph, sample))
    assert engine.warmed_with == "recorded values"
    outputs = engine.run(read_sample(sample, case.signature))
    assert all(len(np.unique(output, axis=0)) > 1 for name, output in outputs.items() if name.startswith("proba"))


def test_they_are_the_centers_the_fills_and_known_categories(cases: Callable[[str], Case]) -> None:
    case = cases("mixed")
    values = read_sample(representative_sample(case.features, case.signature) or b"", case.signature)
    assert {name: array.ravel().tolist() for name, array in values.items()} == {
        "age in years": pytest.approx([30.1, 42.3], rel=1e-6),
        "port.of.départ": ["S", "new york"],
        "class": [1, 2],
        "net.1.weight": [28.0, 59.0],
        "value_3": ["high", "low"],
    }


def test_tensors_and_tokens_are_within_the_limits_of_the_graph() -> None:
    pixels = TensorColumn(name="p", datatype="UINT8", shape=(2, 2), shift=(250.4,), scale=(90.0,))
    tokens = TokensColumn(name="t", length=3, vocab_size=4, tokenizer="0" * 64)
    for column, wanted in ((pixels, [250] * 4 + [255] * 4), (tokens, [0, 1, 2, 3, 0, 1])):
        features = Features(columns=(column,), task="classification", target="y", labels=("a", "b"))
        signature = build_signature(features)
        values = read_sample(representative_sample(features, signature) or b"", signature)
        assert values[column.name].ravel().tolist() == wanted


def test_numbers_beyond_the_datatype_are_cut() -> None:
    features = Features(columns=(NumericColumn(name="x", shift=3e38, scale=3e38),), task="regression", target="y")
    signature = build_signature(features)
    sample = representative_sample(features, signature)
    assert sample is not None
    assert np.isfinite(read_sample(sample, signature)["x"]).all()


def test_large_tensors_bring_none() -> None:
    image = TensorColumn(name="p", shape=(1, MAX_ELEMENTS + 1))
    features = Features(columns=(image,), task="regression", target="y")
    assert representative_sample(features, build_signature(features)) is None


def test_an_exported_run_brings_them_and_no_row_of_its_data(file_store: ObstoreStore, run: str) -> None:
    bundle = load_bundle(file_store, export_run(file_store, run).bundle_id)
    assert bundle.sample is not None
    assert [entry["data"] for entry in json.loads(bundle.sample)["inputs"]] == [[1.0, 3.0], [0.0, 1.0]]
    assert export_run(file_store, run).bundle_id == bundle.id
    assert Engine(bundle).warmed_with == "recorded values"
    assert Engine(replace(bundle, sample=None)).warmed_with == "zeros", "bundles of before load as they did"
