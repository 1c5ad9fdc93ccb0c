from itertools import pairwise

import pytest
from torch import nn

from maas_ray.errors import SpecError
from maas_ray.spec import parse_spec
from maas_ray.train.optim.optimizer import build_optimizer
from maas_ray.train.optim.schedule import build_schedule, check_schedule, learning_rate_factor
from maas_ray.train.spec.optim import OptimizerSpec
from maas_ray.train.spec.schedule import ScheduleSpec

PARTS = "tests.support.custom_parts"


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"warmup_steps": 3}, [0.25, 0.5, 0.75, 1, 1]),
        ({"name": "linear"}, [1, 0.75, 0.5, 0.25, 0]),
        ({"name": "linear", "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "cosine"}, [1, 0.8535534, 0.5, 0.1464466, 0]),
        ({"name": "cosine", "min_lr_ratio": 0.5}, [1, 0.9267767, 0.75, 0.5732233, 0.5]),
        ({"name": "linear", "warmup_steps": 1}, [0.5, 1, 2 / 3, 1 / 3, 0]),
        ({"name": "one_cycle", "rise_ratio": 0.5}, [0.04, 0.52, 1, 0.5, 0]),
        ({"name": "one_cycle", "rise_ratio": 0.0, "min_lr_ratio": 0.5}, [1, 0.9267767, 0.75, 0.5732233, 0.5]),
        ({"name": "one_cycle", "rise_ratio": 1.0, "initial_lr_ratio": 0.5}, [0.5, 0.5732233, 0.75, 0.9267767, 1]),
        ({"name": "warmup_stable_decay", "decay_ratio": 0.5}, [1, 1, 1, 0.5, 0]),
        ({"name": "warmup_stable_decay", "decay_ratio": 1.0, "min_lr_ratio": 0.2}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"name": "warmup_stable_decay", "warmup_steps": 1, "decay_ratio": 1 / 3}, [0.5, 1, 1, 1, 0]),
        ({"name": "plateau"}, [1, 1, 1, 1, 1]),
        ({"name": "tests.support.custom_parts:halved"}, [1, 1, 0.5, 0.5, 0.5]),
        ({"name": "tests.support.custom_parts:halved", "params": {"after": 1}, "warmup_steps": 1}, [0.5, 1, 1, 1, 0.5]),
    ],
)
def test_a_schedule_gives_the_documented_learning_rate_at_each_step(spec: dict, expected: list[float]) -> None:
    optimizer = build_optimizer(OptimizerSpec(name="sgd", lr=2.0), nn.Linear(1, 1))
    schedule = build_schedule(ScheduleSpec(**spec), optimizer, 4)
    rates = []
    for _ in range(5):
        rates.append({group["lr"] for group in optimizer.param_groups})
        optimizer.step()
        schedule.step()
    assert [rate for group in rates for rate in group] == pytest.approx([2 * factor for factor in expected])


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "warmup_stable_decay", "plateau"])
def test_a_schedule_climbs_then_never_climbs_again(name: str) -> None:
    factors = [learning_rate_factor(ScheduleSpec(name=name, warmup_steps=10), step, 100) for step in range(120)]
    assert all(a < b for a, b in pairwise(factors[:11]))
    assert factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:]))


@pytest.mark.parametrize(("warmup_steps", "total_steps"), [(5, 5), (6, 5), (0, 0)])
def test_a_schedule_without_steps_after_the_warm_up_is_refused(warmup_steps: int, total_steps: int) -> None:
    optimizer = build_optimizer(OptimizerSpec(), nn.Linear(1, 1))
    with pytest.raises(SpecError, match="optimizer step"):
        build_schedule(ScheduleSpec(warmup_steps=warmup_steps), optimizer, total_steps)


def test_the_rate_of_any_step_is_known_without_the_steps_before() -> None:
    spec = ScheduleSpec(name="one_cycle")
    optimizer, other = (build_optimizer(OptimizerSpec(), nn.Linear(1, 1)) for _ in range(2))
    schedule, jumped = build_schedule(spec, optimizer, 100), build_schedule(spec, other, 100)
    for _ in range(37):
        schedule.step()
    jumped.set_step(37)
    assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
    assert jumped.lr == schedule.lr
    schedule.set_scale(0.5)
    assert schedule.lr == optimizer.param_groups[0]["lr"] == 0.5 * jumped.lr


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"name": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'?"),
        ({"name": "plateau", "rise_ratio": 0.5}, "plateau has no option rise_ratio; remove it, or use one_cycle"),
        ({"name": "one_cycle", "warmup_steps": 3}, "one_cycle has no option warmup_steps"),
        ({"name": "cosine", "params": {"a": 1}}, "cosine has no option params; remove it, or use an import path"),
        ({"name": f"{PARTS}:halved", "patience": 3}, "has no option patience; remove it, or use plateau"),
    ],
)
def test_an_option_that_a_schedule_does_not_have_is_refused(document: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(ScheduleSpec, document)


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("halvd", {}, "has no attribute 'halvd'; did you mean 'halved'?"),
        ("halved", {"befor": 1}, r"halved cannot be called with 2 arguments and the params befor"),
        ("negative", {}, "returns -1.0 at step 0 of 50; return a factor"),
        ("Falls", {}, "returns .* and later .* for step .*; a resumed run starts at any step"),
        ("of_one_argument", {}, "cannot be called with 2 arguments"),
    ],
)
def test_a_users_schedule_is_checked_before_the_first_step(name: str, params: dict, message: str) -> None:
    with pytest.raises(SpecError, match=f"schedule.name: {PARTS}:{name} .*{message}|{message}"):
        check_schedule(ScheduleSpec(name=f"{PARTS}:{name}", params=params), 50)
    check_schedule(ScheduleSpec(name=f"{PARTS}:halved", params={"after": 0.25}), 50)
