"""The moving average of the weights: what it is, where it is used, and that it survives whatever the weights survive."""

import math
from pathlib import Path

import pytest
import torch
from schedulefree import AdamWScheduleFree
from torch import nn

from maas_ray.checkpoint.catalog import open_checkpoint
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into, read_tensors
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.errors import SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.progress import Progress
from maas_ray.train.loop.step import train_step
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.optim.average import OptimizerAverage
from maas_ray.train.optim.ema import Ema
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.state.restore import restore, tensors_of
from maas_ray.train.validation.hooks import sync_validation
from tests.support.small_runs import make_run

DECAY, STEPS, SAVED_AT = 0.8, 6, 3


@pytest.mark.parametrize("start", [0, 3])
def test_the_average_follows_its_formula(start: int) -> None:
    net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    net[1].bias.requires_grad_(False)
    ema = Ema([net], DECAY, start)
    expected = net[0].weight.detach().clone()
    for step in range(1, STEPS + 1):
        with torch.no_grad():
            net[0].weight.add_(torch.randn(2, 3))
        ema.update(step)
        weight = net[0].weight.detach()
        expected = weight.clone() if step <= start else DECAY * expected + (1 - DECAY) * weight
    assert torch.allclose(ema.averages["0.weight"], expected, rtol=0, atol=1e-14)
    assert not torch.allclose(ema.averages["0.weight"], net[0].weight, atol=1e-3)
    assert set(ema.averages) == {"0.weight", "0.bias", "1.weight"}, "only what is trained"


def test_the_network_computes_with_it_within_the_block_and_is_the_same_bits_afterwards() -> None:
    net = nn.Linear(3, 2)
    ema = Ema([net], DECAY, 0)
    with torch.no_grad():
        net.weight.normal_()
    ema.update(1)
    before, average = net.weight.detach().clone(), ema.averages["weight"].clone()
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied():
        assert torch.equal(net.weight, average)
        raise RuntimeError("evaluation failed")
    assert torch.equal(net.weight, before)
    assert torch.equal(ema.averages["weight"], average)


def _trained(store: ObstoreStore, directory: Path, first: int, last: int, committed: str | None = None) -> TrainState:
    spec, dataset = make_run(store, directory, "mlp", steps=STEPS, ema={"decay": DECAY, "start_step": 1})
    rows, coordinates = dataset.num_rows["train"], RankCoordinates(MeshLayout(), None)
    state = build_train_state(spec, dataset.features, rows, coordinates, torch.device("cpu"))
    plan, loader = build_plan(spec, rows), build_loader(spec, dataset, coordinates)
    if committed is not None:
        saved = open_checkpoint(store, committed)
        restore(state, first, read_index(saved), lambda wanted: load_into(saved, wanted))
    state.train()
    for step in range(first, last):
        train_step(plan, state, loader, step)
    return state


def test_a_resumed_run_has_the_same_bits(file_store: ObstoreStore, tmp_path: Path) -> None:
    undisturbed = tensors_of(_trained(file_store, tmp_path, 0, STEPS))
    half = _trained(file_store, tmp_path, 0, SAVED_AT)
    save(file_store, "half", Snapshot(SAVED_AT, SAVED_AT * 12, tensors_of(half)))
    resumed = tensors_of(_trained(file_store, tmp_path, SAVED_AT, STEPS, "half"))
    assert undisturbed.keys() == resumed.keys()
    assert sum(name.startswith("ema.") for name in resumed) == sum(1 for _ in half.parts[0].parameters())
    for name, value in undisturbed.items():
        assert torch.equal(value, resumed[name]), name
    assert read_tensors(open_checkpoint(file_store, "half"), "ema.").keys() == half.average.averages.keys()  # type: ignore[union-attr]


def test_validation_and_its_samples_are_of_the_averages_and_leave_the_weights_alone(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    changes = {"steps": STEPS, "ema": {"decay": DECAY}, "tensorboard": {"samples": 2}}
    spec, dataset = make_run(file_store, tmp_path, "mlp", **changes)
    state = build_train_state(spec, dataset.features, 62, RankCoordinates(MeshLayout(), None), torch.device("cpu"))
    plan = build_plan(spec, 62)
    assert state.average is not None
    with torch.no_grad():
        for weight in state.parts[0].parameters():
            weight.zero_()  # equal logits: every class has the same probability
    before = {name: value.clone() for name, value in tensors_of(state).items()}
    reports: list[Progress] = []
    state.train(False)
    validate = sync_validation(spec, plan, dataset, state, reports.append)
    assert validate is not None
    validate(3)
    (report,) = reports
    assert report.step == 3
    assert report.metrics["loss"] != pytest.approx(math.log(4), rel=1e-6), "the averages are still the initial weights"
    assert report.samples.startswith("| row | target | predicted |")
    assert all(torch.equal(value, before[name]) for name, value in tensors_of(state).items())


def test_a_schedule_free_optimizer_is_evaluated_with_its_average_and_continues_with_the_same_bits() -> None:
    # The average by its definition: x = y + (1 - 1/beta1) (z - y), from the weights y and the optimizer's state z.
    net = nn.Linear(3, 2)
    optimizer = AdamWScheduleFree(net.parameters(), lr=0.1)
    optimizer.train()
    for _ in range(4):
        net.weight.grad, net.bias.grad = torch.randn(2, 3), torch.randn(2)
        optimizer.step()
    trained, base = net.weight.detach().clone(), optimizer.state[net.weight]["z"]
    expected = trained + (1 - 1 / 0.9) * (base - trained)
    average = OptimizerAverage([net], optimizer)
    assert torch.allclose(average.averages["weight"], expected, atol=1e-6)
    assert not torch.allclose(expected, trained, atol=1e-3)
    with pytest.raises(RuntimeError, match="evaluation failed"), average.applied():
        assert torch.allclose(net.weight, expected, atol=1e-6)
        raise RuntimeError("evaluation failed")
    assert torch.equal(net.weight, trained)


def test_a_second_average_of_a_schedule_free_optimizer_is_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    optimizer = {"name": "schedulefree:AdamWScheduleFree"}
    spec, dataset = make_run(file_store, tmp_path, "mlp", optimizer=optimizer, ema={"decay": DECAY})
    with pytest.raises(SpecError, match="ema: .* keeps an average of the weights by itself"):
        build_train_state(spec, dataset.features, 62, RankCoordinates(MeshLayout(), None), torch.device("cpu"))
