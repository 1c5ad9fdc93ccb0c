"""Dates and numbers that float32 would round: the exported graph takes them as FP64 and computes what training computed."""

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.sources import wide
from maas_ray.data.spec.features import DATE_PARTS, Column, DateColumn, DateEncoding, Features, NumericColumn
from maas_ray.data.stored.random_rows import draw_rows
from maas_ray.errors import GateError
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import check_parity
from maas_ray.optimize.representative import representative_sample


def _date(encoding: DateEncoding) -> DateColumn:
    ones = (1.0,) * len(DATE_PARTS[encoding])
    return DateColumn(name="day", encoding=encoding, origin=1577836801.0, shift=ones, scale=ones, fill=ones)


def _features(*columns: Column) -> Features:
    return Features(columns=columns, task="regression", target="y")


IDS = NumericColumn(name="id", offset=1e11 + 1, shift=300.0, scale=200.0)
CASES = {"number": IDS, **{encoding: _date(encoding) for encoding in DATE_PARTS}}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_training_computed(name: str) -> None:
    features = _features(CASES[name], NumericColumn(name="x"))
    net = nn.Linear(features.row.shape[0], 1)
    graph, signature = export(net, features)
    assert [one.datatype for one in signature.inputs] == ["FP64", "FP32"]
    assert signature.inputs[0].nullable == (name != "number")
    check_parity(net, features, graph, draw_rows(features, 50, seed=1))
    assert representative_sample(features, signature) is not None


def test_identifiers_stay_distinct_and_a_float32_shift_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    features = _features(IDS)
    raw = [IDS.offset + np.arange(42.0).reshape(-1, 1)]  # type: ignore[operator]
    assert len(np.unique(encode_columns(features, raw)[0])) == 42
    net = nn.Linear(1, 1)
    graph, _ = export(net, features)
    found = onnxruntime.InferenceSession(graph).run(None, {"id": raw[0]})[0]
    assert len(np.unique(found)) == 42
    right = wide.Narrowing.apply
    monkeypatch.setattr(
        wide.Narrowing,
        "apply",
        lambda self, xp, values: right(self, xp, values if xp is np else values.to(torch.float32).to(torch.float64)),
    )
    rounded, _ = export(net, features)
    with pytest.raises(GateError, match="differs from the trained model"):
        check_parity(net, features, rounded, raw)
