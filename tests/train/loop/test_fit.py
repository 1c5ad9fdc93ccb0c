import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from maas_ray.data.loading.loader import Loader
from maas_ray.errors import TrainingFailed
from maas_ray.train.loop import step as optimizer_step
from maas_ray.train.loop.fit import LoopHooks, fit
from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.progress import Progress
from maas_ray.train.loop.step import warm_up_buckets
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.modules.dropout import replace_dropout
from maas_ray.train.optim.schedule import Schedule
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.spec.parallelism import MeshLayout
from tests.support.ranks import run_ranks

NUM_ROWS = 50


def _plan(**changes: Any) -> LoopPlan:
    numbers = {
        "global_size": 12,
        "num_rows": NUM_ROWS,
        "stop": 3 * NUM_ROWS,
        "total_steps": 13,
        "seed": 3,
        "log_every": 1,
        "checkpoint_every": 4,
        "validate_every": None,
        "max_grad_norm": 1.0,
        "precision": "fp32",
    }
    return LoopPlan(**{**numbers, **changes})


def _net(dropout: float, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Dropout(dropout), nn.Linear(32, 16), nn.Linear(16, 3)).to(
        dtype
    )


def _train_state(dropout: float = 0.2, dtype: torch.dtype = torch.float32, by_sample: bool = True) -> TrainState:
    net = _net(dropout, dtype)
    if by_sample:
        replace_dropout(net)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    model = DistributedDataParallel(net, bucket_cap_mb=1) if dist.is_initialized() else net
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02)
    return TrainState(
        parts=[net],
        model=model,
        preprocess=lambda rows: rows,
        loss=lambda logits, target: nn.functional.cross_entropy(logits, target, reduction="none"),
        l2=1e-3,
        optimizer=optimizer,
        schedule=Schedule(optimizer, lambda step: 1 / (1 + step)),
        device=torch.device("cpu"),
        coordinates=RankCoordinates(MeshLayout(dp_replicate=world), None, dp=rank),
        dtype=dtype,
    )


def _loader(plan: LoopPlan, accumulation_steps: int = 1, dtype: Any = np.float32) -> Loader:
    rng = np.random.default_rng(0)
    columns = [rng.normal(size=(NUM_ROWS, 6)).astype(dtype)]
    target = rng.integers(0, 3, NUM_ROWS)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return Loader(
        columns,
        target,
        seed=plan.seed,
        global_batch=plan.global_size,
        rank=rank,
        world=world,
        accumulation_steps=accumulation_steps,
    )


class Hooks(LoopHooks):
    """Hooks that call functions."""

    def __init__(
        self,
        *,
        report: Callable[[Progress], Any] = lambda _: None,
        save: Callable[[int], Any] = lambda _: None,
        validate: Callable[[int], Any] | None = None,
        stop: Callable[[bool], bool] = lambda _: False,
    ) -> None:
        self.validates = validate is not None
        self.report = report  # type: ignore[method-assign]
        self.save = save  # type: ignore[method-assign]
        self.should_stop = stop  # type: ignore[method-assign]
        if validate is not None:
            self.validate = validate  # type: ignore[method-assign]


def _train(
    state: TrainState, plan: LoopPlan, loader: Loader, first_step: int = 0
) -> tuple[list[float], dict[int, Any]]:
    """Trains to the end; returns the losses and the state at each checkpoint."""
    losses: list[float] = []
    states: dict[int, Any] = {}

    def keep(done: int) -> None:
        copies = {name: value.clone() for name, value in state.parts[0].state_dict().items()}
        optimizer = {
            "state": {
                index: {name: value.clone() for name, value in values.items()}
                for index, values in state.optimizer.state_dict()["state"].items()
            },
            "param_groups": [dict(group) for group in state.optimizer.state_dict()["param_groups"]],
        }
        states[done] = (copies, optimizer)

    fit(plan, state, loader, first_step, Hooks(report=lambda progress: losses.append(progress.loss or 0.0), save=keep))
    return losses, states


def _stopped_and_resumed(rank: int, with_seeds: bool = True) -> list[Any]:
    """Trains once undisturbed and once again from each checkpoint; returns both final weights and losses."""
    with _seeding(with_seeds):
        plan = _plan()
        loader = _loader(plan)
        undisturbed = _train_state(by_sample=with_seeds)
        warm_up_buckets(plan, undisturbed, loader)
        losses, states = _train(undisturbed, plan, loader)
        outcomes = [[losses, undisturbed.parts[0].state_dict()]]
        for step in sorted(states)[:-1]:
            resumed = _train_state(by_sample=with_seeds)
            warm_up_buckets(plan, resumed, loader)
            model, optimizer = states[step]
            resumed.parts[0].load_state_dict(model)
            resumed.optimizer.load_state_dict(optimizer)
            resumed.schedule.set_step(step)
            again, _ = _train(resumed, plan, loader, step)
            outcomes.append([losses[:step] + again, resumed.parts[0].state_dict()])
        return outcomes


@contextmanager
def _seeding(is_on: bool) -> Iterator[None]:
    seed_step: Callable[..., None] = optimizer_step.seed_step
    if not is_on:
        optimizer_step.seed_step = lambda *_: None
    try:
        yield
    finally:
        optimizer_step.seed_step = seed_step


def _differ(outcomes: list[Any]) -> bool:
    (losses, weights), *others = outcomes
    return any(
        losses != again or any(not torch.equal(weights[name], value) for name, value in resumed.items())
        for again, resumed in others
    )


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit_in_one_process() -> None:
    assert not _differ(_stopped_and_resumed(0))


def test_a_resumed_run_equals_the_undisturbed_one_bit_for_bit_on_three_ranks() -> None:
    for outcomes in run_ranks(_stopped_and_resumed, 3):
        assert len(outcomes) == 4
        assert not _differ(outcomes)


def test_the_comparison_notices_dropout_that_is_not_seeded_by_step() -> None:
    assert _differ(_stopped_and_resumed(0, with_seeds=False))


def _in_double(rank: int, accumulations: list[int]) -> list[Any]:
    outcomes = []
    for accumulation_steps in accumulations:
        plan = _plan()
        state = _train_state(dropout=0.0, dtype=torch.float64)
        losses, _ = _train(state, plan, _loader(plan, accumulation_steps, np.float64))
        outcomes.append([losses, state.parts[0].state_dict()])
    return outcomes


def test_ranks_and_accumulation_give_the_gradients_of_the_whole_batch() -> None:
    """The last batch has 6 rows: 2 ranks x 5 micro-batches leave some without a row, and all count alike."""
    losses, weights = _in_double(0, [1])[0]
    for outcomes in run_ranks(_in_double, 2, [1, 5]):
        for other_losses, other in outcomes:
            assert other_losses == pytest.approx(losses, rel=1e-12)
            for name, value in weights.items():
                torch.testing.assert_close(other[name], value, atol=1e-12, rtol=1e-12)


def test_seeding_a_step_determines_every_draw_and_leaves_nothing() -> None:
    optimizer_step.seed_step(7, 3, 0)
    drawn = torch.rand(3), np.random.rand(), random.random()
    waiting = len(torch.mtia._queued_calls)
    for step in (1, 2, 3):
        optimizer_step.seed_step(7, step, 0)
    again = torch.rand(3), np.random.rand(), random.random()
    assert torch.equal(drawn[0], again[0])
    assert drawn[1:] == again[1:]
    # torch.manual_seed adds one for each call as long as the device is not in use.
    assert len(torch.mtia._queued_calls) == waiting


def test_settling_leaves_weights_buffers_and_gradients_as_they_were() -> None:
    plan = _plan()
    state = _train_state()
    before = {name: value.clone() for name, value in state.parts[0].state_dict().items()}
    warm_up_buckets(plan, state, _loader(plan))
    assert all(torch.equal(before[name], value) for name, value in state.parts[0].state_dict().items())
    assert all(parameter.grad is None for parameter in state.parts[0].parameters())


@pytest.mark.parametrize(
    ("checkpoint_every", "expected"),
    [(4, [4, 8, 12, 13]), (13, [13]), (100, [13]), (None, [5, 9, 13])],
    ids=["every 4", "once", "less often than once", "at each epoch's end"],
)
def test_checkpoints_come_when_asked_and_always_at_the_end(checkpoint_every: int | None, expected: list[int]) -> None:
    plan = _plan(checkpoint_every=checkpoint_every)
    _, states = _train(_train_state(), plan, _loader(plan))
    assert list(states) == expected


def test_validation_runs_in_evaluation_mode_at_each_epochs_end() -> None:
    plan, state = _plan(log_every=100), _train_state()
    reports: list[Progress] = []

    validated: list[int] = []

    def validate(done: int) -> None:
        assert not state.parts[0].training
        validated.append(done)

    saved: list[int] = []
    fit(plan, state, _loader(plan), 0, Hooks(report=reports.append, save=saved.append, validate=validate))
    assert validated == [5, 9, 13]
    assert saved == [4, 8, 12, 13]
    assert state.parts[0].training
    assert reports[-1].epoch == 3.0


def test_what_was_validated_is_committed_where_the_best_is_kept() -> None:
    plan, saved = _plan(saves_validated=True), list[int]()
    fit(plan, _train_state(), _loader(plan), 0, Hooks(save=saved.append, validate=lambda _: None))
    assert saved == [4, 5, 8, 9, 12, 13]


@pytest.mark.parametrize(("at", "validated"), [(5, [5]), (6, [5, 6])], ids=["after a validation", "between two"])
def test_a_run_that_stops_early_ends_with_a_validated_and_committed_state(at: int, validated: list[int]) -> None:
    plan, state, reports = _plan(), _train_state(), list[Progress]()
    events: dict[str, list[int]] = {"validated": [], "saved": []}

    def stop(is_validated: bool) -> bool:
        assert is_validated == (reports[-1].step in (5, 9, 13))
        return reports[-1].step >= at

    calls: dict[str, Any] = {
        "report": reports.append,
        "save": events["saved"].append,
        "validate": events["validated"].append,
    }
    fit(plan, state, _loader(plan), 0, Hooks(stop=stop, **calls))
    assert events == {"validated": validated, "saved": [4, at]}
    assert reports[-1].step == at

    fit(plan, state, _loader(plan), at, Hooks(stop=lambda _: True, **calls))
    assert events["saved"] == [4, at], "a run that is resumed after it has stopped takes no step more"


def test_a_loss_that_is_not_finite_ends_the_run_with_advice() -> None:
    plan, state = _plan(), _train_state()
    with torch.no_grad():
        next(state.parts[0].parameters()).fill_(float("nan"))
    with pytest.raises(TrainingFailed, match=r"loss of step 1 is nan; lower optimizer.lr"):
        _train(state, plan, _loader(plan))


def test_bf16_keeps_weights_and_optimizer_state_in_float32() -> None:
    plan, state = _plan(precision="bf16"), _train_state()
    losses, _ = _train(state, plan, _loader(plan))
    assert losses[-1] < losses[0]
    assert {value.dtype for value in state.parts[0].state_dict().values()} == {torch.float32}
