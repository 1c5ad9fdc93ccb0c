"""A classifier that ends in softmax or sigmoid is noticed, and no other."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from maas_ray.store.objects import ObstoreStore
from maas_ray.train.modules.probabilities import normalized_output
from maas_ray.train.ranks.preflight import check_run
from tests.support.small_runs import make_run

ROWS = torch.randn(8, 5, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        ([nn.Linear(5, 3), nn.Softmax(dim=-1)], "softmax"),
        ([nn.Linear(5, 3)], None),
        ([nn.Linear(5, 3), nn.LogSoftmax(dim=-1)], None),  # a second one changes nothing
        ([nn.Linear(5, 3), nn.Sigmoid()], None),  # bounded logits, but not probabilities of classes
        ([nn.Linear(5, 1), nn.Sigmoid()], "sigmoid"),
        ([nn.Linear(5, 1)], None),
        ([nn.LayerNorm(5), nn.Linear(5, 1)], None),
        ([nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 1)], None),
        ([nn.Linear(5, 1), nn.ReLU()], None),
    ],
)
@pytest.mark.parametrize("seed", range(5))
def test_an_output_of_probabilities_is_noticed(layers: list[nn.Module], expected: str | None, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(*layers)
    for layer in net:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    net.train()
    outputs = 1 if any(isinstance(layer, nn.Linear) and layer.out_features == 1 for layer in layers) else 3
    before = [weight.detach().clone() for weight in net.parameters()]
    assert normalized_output(net, lambda model: model(ROWS), outputs) == expected
    assert net.training
    assert all(torch.equal(one, other) for one, other in zip(net.parameters(), before, strict=True))


def test_small_positive_logits_of_one_output_are_no_probabilities() -> None:
    net = nn.Linear(5, 1)
    with torch.no_grad():
        net.weight.fill_(0.001)
        net.bias.fill_(0.5)
    assert normalized_output(net, lambda model: model(ROWS), 1) is None


def test_a_run_of_such_a_model_is_warned(
    file_store: ObstoreStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "tests.support.nets:Probabilities")
    with caplog.at_level(logging.WARNING, "maas_ray"):
        check_run(spec, dataset, file_store)
    assert "the model ends in softmax, which the loss applies itself; return logits instead" in caplog.text
