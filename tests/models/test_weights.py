from math import sqrt

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from maas_ray.errors import ModelError
from maas_ray.models.weights import INITIALIZATIONS, initialize

FAN_IN, FAN_OUT = 200, 400


@pytest.mark.parametrize(
    ("name", "deviation"),
    [
        ("xavier_uniform", sqrt(2 / (FAN_IN + FAN_OUT))),
        ("xavier_normal", sqrt(2 / (FAN_IN + FAN_OUT))),
        ("he_uniform", sqrt(2 / FAN_IN)),
        ("he_normal", sqrt(2 / FAN_IN)),
        ("orthogonal", sqrt(1 / FAN_OUT)),
        ("normal", 0.02),
    ],
)
def test_an_initialization_has_the_spread_of_its_paper_and_zeroes_biases(name: str, deviation: float) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(FAN_IN, FAN_OUT)
    initialize(layer, name)
    assert layer.weight.std().item() == pytest.approx(deviation, rel=0.03)
    assert abs(layer.weight.mean().item()) < 3 * deviation / sqrt(layer.weight.numel())
    assert not layer.bias.any()


def test_orthogonal_columns_are_orthonormal() -> None:
    layer = nn.Linear(20, 30)
    initialize(layer, "orthogonal")
    torch.testing.assert_close(layer.weight.T @ layer.weight, torch.eye(20))


@pytest.mark.parametrize("name", INITIALIZATIONS)
def test_an_initialization_reaches_every_layer_that_has_weights_and_no_normalization(name: str) -> None:
    model = nn.ModuleList(
        [
            nn.Conv2d(3, 4, 3),
            nn.ConvTranspose1d(3, 4, 3),
            nn.MultiheadAttention(8, 2),
            nn.LSTM(5, 6),
            nn.LayerNorm([4, 4]),
        ]
    )
    before = {key: value.clone() for key, value in model.state_dict().items()}
    initialize(model, name)
    for key, value in model.state_dict().items():
        if key.startswith("4."):
            assert torch.equal(value, before[key]), key
        elif "bias" in key:
            assert not value.any(), key
        else:
            assert not torch.equal(value, before[key]), key


def test_the_default_leaves_the_weights_alone() -> None:
    layer = nn.Linear(3, 3)
    before = layer.weight.clone()
    initialize(layer, "default")
    assert torch.equal(layer.weight, before)


def test_embeddings_are_drawn_by_normal_only() -> None:
    model = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 2))
    before = model[0].weight.clone()
    initialize(model, "he_normal")
    assert torch.equal(model[0].weight, before)
    initialize(model, "normal")
    assert model[0].weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(weight_norm(nn.Linear(3, 3))), "cannot be applied to 0"),
        (nn.LayerNorm(3), "found no weights in LayerNorm"),
    ],
)
def test_a_model_whose_weights_cannot_be_drawn_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        initialize(model, "he_normal")
