"""A Keras model by import path: seeded by torch, saved by order, copied, exported. Keras itself takes seconds to start."""

import copy
import sys

import numpy as np
import pytest
import torch

from maas_ray.data.spec.features import Features, TensorColumn
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import check_parity
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from tests.support.root import ROOT

FEATURES = Features(
    columns=(TensorColumn(name="image", datatype="UINT8", shape=(1, 8, 8), scale=(16.0,)),),
    task="classification",
    target="y",
    labels=tuple("0123456789"),
)


@pytest.mark.fault
def test_the_keras_example_is_trained_saved_and_exported_like_a_torch_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "jobs"))
    spec = ModelSpec(name="keras_digits:KerasConvnet", params={"width": 4})

    def build(seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return build_model(spec, Row((1, 8, 8)), 10)

    net, same, other = build(1), build(1), build(2)
    assert "keras" in sys.modules
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(net.state_dict().values(), same.state_dict().values()))
    assert not torch.equal(next(net.parameters()), next(other.parameters()))

    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    images, target = torch.randn(64, 1, 8, 8), torch.arange(64) % 10
    before = copy.deepcopy(net.state_dict())
    losses = []
    for _ in range(10):
        loss = torch.nn.functional.cross_entropy(net(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert changed == list(before), "weights, running means and the state of dropout"

    other.load_state_dict(net.state_dict())
    net.eval()
    with torch.no_grad():
        expected = net(images)
        assert torch.equal(other.eval()(images), expected), "other names in the process, the same weights"
        assert torch.equal(copy.deepcopy(net)(images), expected)
        assert not torch.equal(net.train()(images), expected), "dropout is on in training only"
    graph, _ = export(net, FEATURES)
    rows = [np.random.default_rng(0).integers(0, 16, (50, 1, 8, 8)).astype(np.uint8)]
    assert check_parity(net, FEATURES, graph, rows)["passed"]
