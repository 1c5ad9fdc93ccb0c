from pathlib import Path

import pytest
from torch import nn

from maas_ray.errors import SpecError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.optim.optimizer import build_optimizer
from maas_ray.train.optim.parameter_groups import freeze_weights
from maas_ray.train.optim.schedule import build_schedule
from maas_ray.train.spec.optim import OptimizerSpec
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.schedule import ScheduleSpec
from maas_ray.train.verify import verify_layouts
from tests.support.small_runs import make_run


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
        self.head = nn.Linear(4, 2)


@pytest.mark.parametrize("name", ["adamw", "muon", "tests.support.custom_parts:Momentum"])
def test_weights_have_the_rate_and_the_decay_of_the_first_group_that_matches(name: str) -> None:
    groups = [
        {"match": ["encoder.0.*", "encoder.1.bias"], "lr_factor": 0.25, "weight_decay": 0.5},
        {"match": ["encoder.*"], "lr_factor": 0.5},
    ]
    spec = OptimizerSpec.model_validate({"name": name, "lr": 0.4, "weight_decay": 0.1, "groups": groups})
    net = _Net()
    optimizer = build_optimizer(spec, net)
    schedule = build_schedule(ScheduleSpec(name="linear"), optimizer, 4)
    schedule.set_step(2)
    assert schedule.lr == pytest.approx(0.2)
    names = {id(weight): name for name, weight in net.named_parameters()}
    found = {
        names[id(weight)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for weight in group["params"]
    }
    assert found == {
        "encoder.0.weight": (0.05, 0.5),
        "encoder.0.bias": (0.05, 0.5),
        "encoder.1.weight": (0.1, 0.0),
        "encoder.1.bias": (0.05, 0.5),
        "encoder.2.weight": (0.1, 0.1),
        "encoder.2.bias": (0.1, 0.0),
        "head.weight": (0.2, 0.1),
        "head.bias": (0.2, 0.0),
    }


def test_frozen_weights_are_not_trained() -> None:
    net = _Net()
    freeze_weights(OptimizerSpec(freeze=("encoder.*",)), net)
    assert [name for name, weight in net.named_parameters() if weight.requires_grad] == ["head.weight", "head.bias"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"freeze": ["encode.*"]}, r"optimizer.freeze: no weight of the model matches 'encode.\*'; did you mean"),
        ({"freeze": ["x"]}, "its weights are such as encoder.0.weight"),
        ({"groups": [{"match": ["head.*", "neck.*"]}]}, r"optimizer.groups.0.match: no weight .* 'neck.\*'"),
        ({"freeze": ["head.*"], "groups": [{"match": ["head.*"]}]}, r"optimizer.groups.0: all weights .* are frozen"),
        ({"groups": [{"match": ["*"]}, {"match": ["head.*"]}]}, "optimizer.groups.1: .* belong to an earlier group"),
    ],
)
def test_patterns_without_effect_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        freeze_weights(OptimizerSpec.model_validate(fields), _Net())


@pytest.mark.fault
def test_every_layout_trains_and_freezes_the_same_weights(file_store: ObstoreStore, tmp_path: Path) -> None:
    groups = [{"match": ["block_0.*", "embedding.*"], "lr_factor": 0.3}]
    optimizer = {"lr": 0.01, "freeze": ["block_1.*", "block_2.mlp.*"], "groups": groups}
    spec, dataset = make_run(file_store, tmp_path, "decoder", optimizer=optimizer)
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(tp=2), MeshLayout(pp=2)]
    compared = verify_layouts(spec, dataset.digest, layouts, steps=2)
    assert all(one.is_equal for one in compared), compared
