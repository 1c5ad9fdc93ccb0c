import copy

import pytest
import torch
from torch import nn

from maas_ray.errors import ModelError, SpecError
from maas_ray.spec import parse_spec
from maas_ray.train.optim.optimizer import build_optimizer, hidden_matrices
from maas_ray.train.optim.schedule import build_schedule
from maas_ray.train.spec.optim import OptimizerSpec
from maas_ray.train.spec.schedule import ScheduleSpec

OPTIMIZERS = [
    {"name": "sgd", "lr": 0.05},
    {"name": "sgd", "lr": 0.05, "momentum": 0.9, "nesterov": True},
    {"name": "adam", "lr": 0.05},
    {"name": "adamw", "lr": 0.05, "betas": (0.8, 0.99)},
    {"name": "rmsprop", "lr": 0.01, "momentum": 0.5, "alpha": 0.9},
    {"name": "muon", "lr": 0.1, "weight_decay": 0.01},
]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, schedule, num_steps: int) -> list[float]:
    torch.manual_seed(1)
    x = torch.randn(32, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])
    losses = []
    for _ in range(num_steps):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_an_optimizer_lowers_the_loss_and_continues_bit_identically_from_its_state(spec: dict) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = build_optimizer(OptimizerSpec(**spec), model)
    cosine = ScheduleSpec(name="cosine", warmup_steps=3)
    schedule = build_schedule(cosine, optimizer, 40)
    losses = train(model, optimizer, schedule, 20)
    assert losses[-1] < losses[0] / 2

    resumed = copy.deepcopy(model)
    optimizer_2 = build_optimizer(OptimizerSpec(**spec), resumed)
    schedule_2 = build_schedule(cosine, optimizer_2, 40)
    optimizer_2.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    schedule_2.set_step(20)
    assert train(resumed, optimizer_2, schedule_2, 15) == train(model, optimizer, schedule, 15)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_weight_decay_spares_biases_and_normalizations() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    optimizer = build_optimizer(OptimizerSpec(name="sgd", lr=0.5, weight_decay=0.1), model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    (0.0 * model(torch.randn(3, 4)).sum()).backward()
    optimizer.step()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key] * (0.95 if key == "0.weight" else 1.0))


def test_frozen_parameters_are_not_optimized() -> None:
    model = nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    optimizer = build_optimizer(OptimizerSpec(), model)
    assert [parameter.shape for group in optimizer.param_groups for parameter in group["params"]] == [(2,)]
    with pytest.raises(ModelError, match="Linear has no parameter to train"):
        build_optimizer(OptimizerSpec(), model.requires_grad_(False))


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"name": "adam", "momentum": 0.9}, "adam has no option momentum; remove it, or use sgd or rmsprop"),
        ({"name": "sgd", "eps": 1e-6}, "sgd has no option eps"),
        ({"name": "sgd", "nesterov": True}, "nesterov needs a momentum"),
        ({"name": "adam", "betas": [0.9, 1.0]}, "betas must be in"),
        ({"lr": 0}, "lr"),
        ({"name": "adamv"}, "unknown optimizer 'adamv'; did you mean 'adam'?"),
        ({"name": "adam", "params": {"eps": 1}}, "adam has no params"),
        ({"learning_rate": 1}, "unknown key 'learning_rate'"),
    ],
)
def test_an_option_that_means_nothing_is_refused(document: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(OptimizerSpec, document)


def test_a_dumped_spec_is_accepted_again() -> None:
    for spec in OPTIMIZERS:
        assert OptimizerSpec.model_validate(OptimizerSpec(**spec).model_dump(mode="json")) == OptimizerSpec(**spec)


def test_muon_updates_the_matrices_between_layers_and_adamw_the_rest() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 3))
    assert hidden_matrices(model) == {"1.weight", "3.weight"}
    optimizer = build_optimizer(OptimizerSpec(name="muon", lr=0.1), model)
    names = {id(weight): name for name, weight in model.named_parameters()}
    model(torch.tensor([0, 1, 2])).sum().backward()
    optimizer.step()
    keys = {names[id(weight)]: sorted(state) for weight, state in optimizer.state.items()}
    assert {name for name, found in keys.items() if found == ["momentum_buffer"]} == {"1.weight", "3.weight"}
    assert keys["4.weight"] == keys["0.weight"] == ["exp_avg", "exp_avg_sq", "step"]


@pytest.mark.parametrize("spec", OPTIMIZERS)
def test_every_implementation_computes_the_same_update(spec: dict) -> None:
    def trained(implementation: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        changed = {"weight_decay": 0.01, **spec, "implementation": implementation}
        optimizer = build_optimizer(OptimizerSpec(**changed), model)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(5, 4, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
        return [parameter.detach() for parameter in model.parameters()]

    expected = trained("loop")
    for implementation in ["auto", "foreach", *(["fused"] if spec["name"] != "rmsprop" else [])]:
        for one, other in zip(trained(implementation), expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.0, atol=1e-12)


def test_a_fused_kernel_that_does_not_exist_is_refused() -> None:
    with pytest.raises(SpecError, match="rmsprop has no fused implementation; use auto"):
        parse_spec(OptimizerSpec, {"name": "rmsprop", "implementation": "fused"}, source="s")
