import pytest
import torch
from torch import nn

from maas_ray.train.loop.gradients import add_penalty_gradient, penalty
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.spec.parallelism import MeshLayout


def train_state_of(model: nn.Module, l1: float, l2: float) -> TrainState:
    optimizer = torch.optim.SGD(model.parameters())
    return TrainState(
        parts=[model],
        model=model,
        preprocess=lambda *columns: columns[0],
        loss=lambda logits, target: logits,
        optimizer=optimizer,
        schedule=torch.optim.lr_scheduler.ConstantLR(optimizer),
        device=torch.device("cpu"),
        coordinates=rank_coordinates(MeshLayout(), "cpu"),
        l1=l1,
        l2=l2,
    )


def test_the_penalty_sums_over_weights_and_spares_biases_normalizations_and_frozen_layers() -> None:
    model = nn.Sequential(nn.Linear(2, 1), nn.LayerNorm([1, 1]), nn.Linear(1, 1))
    model[2].requires_grad_(False)
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[3.0, -4.0]]))
        model[0].bias.fill_(100.0)
    state = train_state_of(model, l1=0.1, l2=0.01)
    assert penalty(state.weights, state.l1, state.l2, state.coordinates.layout) == pytest.approx(0.1 * 7 + 0.01 * 25)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    add_penalty_gradient(state.weights, state.l1, state.l2)
    torch.testing.assert_close(model[0].weight.grad, torch.tensor([[0.1 + 0.06, -0.1 - 0.08]]))
    others = [parameter for parameter in model.parameters() if parameter is not model[0].weight]
    assert not any(parameter.grad.any() for parameter in others)


def test_no_penalty_is_zero() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.grad = torch.ones_like(layer.weight)
    assert penalty([layer.weight], 0.0, 0.0, MeshLayout()) == 0.0
    add_penalty_gradient([layer.weight], 0.0, 0.0)
    torch.testing.assert_close(layer.weight.grad, torch.ones_like(layer.weight))
