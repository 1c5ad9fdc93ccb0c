"""Models with weights that nothing uses, or that are frozen, train on replicas and shards as in one process."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from maas_ray.data.stored.dataset import open_dataset
from maas_ray.errors import ModelError
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import train_step, warm_up_buckets
from maas_ray.train.modules.unused_parameters import unused_weights
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from tests.support.ranks import run_ranks
from tests.support.small_runs import make_run

STEPS = 3


class Whole(nn.Module):
    """Uses all that it has."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(*input_shape, 8), nn.ReLU(), nn.Dropout(0.2))
        self.head = nn.Linear(8, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(x))
        return logits


class Forgetful(Whole):
    """Has two weights that it never looks at."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.other = nn.Linear(4, 4)


class Frozen(Whole):
    """Trains its last layer only."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.body.requires_grad_(False)


class Detached(Whole):
    """Returns logits without a gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).detach()


class Choosy(Whole):
    """Uses a weight for some rows only, and not for the zeros with which it is looked at."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(input_shape, num_outputs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.any() else super().forward(x) * self.scale


def _name(kind: type[nn.Module]) -> str:
    return f"{__name__}:{kind.__name__}"


@pytest.mark.parametrize(("kind", "expected"), [(Whole, []), (Frozen, []), (Forgetful, ["other.weight", "other.bias"])])
def test_unused_weights_are_found_and_frozen_ones_are_none(kind: type[nn.Module], expected: list[str]) -> None:
    net = kind((6,), 4)  # type: ignore[call-arg, arg-type]
    net.head.eval()
    assert unused_weights(net, torch.zeros(2, 6)) == expected
    assert [net.training, net.head.training] == [True, False]
    assert all(weight.grad is None for weight in net.parameters())


def test_rank_0_logs_the_unused_weights(
    file_store: ObstoreStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spec, dataset = make_run(file_store, tmp_path, _name(Forgetful))
    with caplog.at_level(logging.WARNING):
        check_run(spec, dataset, file_store)
    assert [record.message for record in caplog.records] == [
        "the model's logits do not depend on other.weight, other.bias, which will not change"
    ]


def test_logits_that_depend_on_no_weight_are_refused(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, _name(Detached))
    with pytest.raises(ModelError, match=r"depend on none of its 4 trained weights.* detach"):
        check_run(spec, dataset, file_store)


def _train(spec: TrainSpec, digest: str, layout: MeshLayout) -> tuple[dict[str, Tensor], bool | None]:
    """All weights after some steps, and whether replicas look for unused ones."""
    dataset = open_dataset(open_store(spec.storage), digest)
    coordinates, num_rows = rank_coordinates(layout, "cpu"), dataset.num_rows["train"]
    state = build_train_state(spec, dataset.features, num_rows, coordinates, torch.device("cpu"), torch.float64)
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates)
    warm_up_buckets(plan, state, loader)
    state.train()
    for step in range(STEPS):
        train_step(plan, state, loader, step)
    named = {name: value.detach() for part in state.parts for name, value in part.named_parameters()}
    whole = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in named.items()}
    looks = state.model.find_unused_parameters if isinstance(state.model, DistributedDataParallel) else None
    return whole, looks


def _train_all(rank: int, runs: list[tuple[str, str]], layouts: list[MeshLayout]) -> list[Any]:
    return [_train(TrainSpec.model_validate_json(spec), digest, layout) for spec, digest in runs for layout in layouts]


def _refusal(rank: int, spec: str, digest: str) -> str:
    try:
        _train(TrainSpec.model_validate_json(spec), digest, MeshLayout(dp_replicate=2))
    except ModelError as error:
        return str(error)
    return ""


@pytest.mark.fault
@pytest.mark.timeout(300)
def test_replicas_and_shards_train_models_with_unused_and_frozen_weights_as_one_process_does(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    kinds, layouts = [Whole, Forgetful, Frozen], [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2)]
    changes = {"batch": {"global_size": 12, "accumulation_steps": 2}, "ema": {"decay": 0.5}}
    runs = []
    for kind in kinds:
        spec, dataset = make_run(file_store, tmp_path, _name(kind), **changes)
        runs.append((spec, dataset.digest))
    alone = [_train(spec, digest, MeshLayout())[0] for spec, digest in runs]
    first, _ = run_ranks(_train_all, 2, [(spec.model_dump_json(), digest) for spec, digest in runs], layouts)
    assert [looks for _, looks in first] == [False, None, True, None, False, None]
    for number, (trained, _) in enumerate(first):
        for name, expected in alone[number // 2].items():
            torch.testing.assert_close(trained[name], expected, rtol=0.0, atol=1e-12)
    untouched = _train(runs[1][0].model_copy(update={"seed": 1}), runs[1][1], MeshLayout())[0]
    assert not torch.equal(alone[1]["head.weight"], untouched["head.weight"])


@pytest.mark.fault
def test_a_weight_unused_by_some_rows_is_refused_with_the_way_out(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, dataset = make_run(file_store, tmp_path, _name(Choosy))
    for message in run_ranks(_refusal, 2, spec.model_dump_json(), dataset.digest):
        assert "did not get the gradient of every weight" in message
        assert "0 * weight.sum()" in message
