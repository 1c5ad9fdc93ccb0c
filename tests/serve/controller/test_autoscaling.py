"""Autoscaling policy inside Serve's own wrapper and context, under simulated loads; and the reports of a replica."""

import math
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import pytest
from pydantic import ValidationError
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from maas_ray.serve.controller.autoscaling import (
    BUSY,
    MAX_REPORTS_PER_S,
    ONGOING,
    RATE,
    AutoscalingSpec,
    Meter,
    Scaler,
    report_interval_s,
)
from maas_ray.serve.deploy.binding import autoscaling_config
from maas_ray.serve.spec.pools import PoolSpec, ReplicaRange
from maas_ray.serve.telemetry.stats import ReplicaStats

TICK_S = 0.1
START_S = 4.0
"""Time that a simulated replica needs to start."""


def simulate(
    load: Callable[[float], float],
    seconds: float,
    *,
    spec: AutoscalingSpec = AutoscalingSpec(),
    bounds: tuple[int, int] = (1, 4),
    busy: Callable[[float], float] = lambda time_s: 0.0,
    rate: Callable[[float], float] = lambda time_s: 0.0,
    queued: Callable[[float], float] = lambda time_s: 0.0,
    target: int | None = None,
) -> list[tuple[float, int]]:
    """Changes of the target, as (second, replicas). `load`, `busy` and `rate` are sums over the pool, by time."""
    numbers = spec.resolve(max_batch_size=64, capacity=576)
    scaler = Scaler(**numbers.scaler_options())
    with pytest.warns(DeprecationWarning, match="metrics_interval_s"):
        config = AutoscalingConfig(
            min_replicas=bounds[0], max_replicas=bounds[1], upscale_delay_s=0, downscale_delay_s=0,
            metrics_interval_s=0.5, look_back_period_s=numbers.look_back_s,
        )  # fmt: skip
    policy = _apply_autoscaling_config(scaler)
    target = bounds[0] if target is None else target
    running, starting = target, list[float]()
    samples: list[tuple[float, float, float, float]] = []
    last_up: float | None = None
    changes: list[tuple[float, int]] = []
    for tick in range(int(seconds / TICK_S)):
        now = tick * TICK_S
        arrived = [at for at in starting if at <= now]
        starting = [at for at in starting if at > now]
        running = min(running + len(arrived), target)
        if tick % 5 == 0 and running:
            samples.append((now, load(now), min(busy(now), running), rate(now)))
        samples = [sample for sample in samples if sample[0] > now - numbers.look_back_s]
        means = [sum(column) / len(samples) / running for column in list(zip(*samples, strict=True))[1:]] if samples and running else None  # fmt: skip
        metrics = {name: dict.fromkeys(range(running), mean) for name, mean in zip((ONGOING, BUSY, RATE), means, strict=True)} if means else {}  # fmt: skip
        context = AutoscalingContext(
            deployment_id=None, deployment_name="maas_replica", app_name="p", current_num_replicas=running,
            target_num_replicas=target, running_replicas=[], total_num_requests=load(now) + queued(now), total_queued_requests=queued(now),
            aggregated_metrics=metrics, raw_metrics={}, capacity_adjusted_min_replicas=bounds[0],
            capacity_adjusted_max_replicas=bounds[1], policy_state={}, last_scale_up_time=last_up,
            last_scale_down_time=None, current_time=1e9 + now, config=config,
        )  # fmt: skip
        wanted = min(bounds[1], max(bounds[0], policy(context)[0]))
        if wanted == target:
            continue
        if wanted > target:
            starting += [now + START_S] * (wanted - target)
            last_up = 1e9 + now
        else:
            starting = []
            running = min(running, wanted)
        target = wanted
        changes.append((round(now, 1), target))
    return changes


def turns(changes: list[tuple[float, int]], first: int) -> int:
    """How often growing and shrinking alternate."""
    sizes = [first, *(size for _, size in changes)]
    steps = [after > before for before, after in pairwise(sizes)]
    return sum(before != after for before, after in pairwise(steps))


@pytest.mark.parametrize(
    ("preset", "load", "wanted", "within_s"), [("latency", 16, 2, 2), ("balanced", 60, 3, 4), ("throughput", 250, 2, 6)]
)
def test_a_step_in_load_is_answered_within_seconds(preset: str, load: float, wanted: int, within_s: float) -> None:
    changes = simulate(lambda time_s: load if time_s >= 10 else 0.5, 30, spec=AutoscalingSpec(preset=preset))
    assert changes[-1][1] == wanted
    assert changes[-1][0] <= 10 + within_s


def test_a_spike_that_is_over_at_once_starts_nothing() -> None:
    assert simulate(lambda time_s: 40 if 10 <= time_s < 10.6 else 1, 40) == []


def test_replicas_end_one_delay_after_the_load_and_not_earlier() -> None:
    spec = AutoscalingSpec(downscale_delay_s=20)
    changes = simulate(lambda time_s: 60 if time_s < 30 else 5, 80, spec=spec)
    assert [size for _, size in changes] == [3, 1]
    assert 48 <= changes[-1][0] <= 55


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("level", [0.5, 1.0, 1.5, 2.0, 2.5])
def test_a_noisy_load_does_not_change_the_number_of_replicas(seed: int, level: float) -> None:
    """Five minutes of a load that jumps by 35 % twice a second, at and between whole numbers of replicas."""
    draw = random.Random(f"{seed} {level}")
    noise = [max(0.0, draw.gauss(1.0, 0.35)) for _ in range(1300)]
    target = AutoscalingSpec().resolve(64, 576).target_ongoing
    changes = simulate(lambda time_s: level * target * noise[int(time_s * 2)], 300)
    assert turns(changes, 1) <= 1, changes
    assert max([1, *(size for _, size in changes)]) <= math.ceil(level) + 2


def test_a_policy_without_memory_flaps_under_the_same_noise() -> None:
    """Negative control of the bound above: the mean of the look-back alone, as without delays."""
    draw = random.Random("0 1.0")
    noise = [max(0.0, draw.gauss(1.0, 0.35)) for _ in range(1300)]
    spec = AutoscalingSpec(upscale_delay_s=0, downscale_delay_s=0)
    target = spec.resolve(64, 576).target_ongoing
    assert turns(simulate(lambda time_s: target * noise[int(time_s * 2)], 300, spec=spec), 1) > 10


def test_a_slow_wave_is_followed_once_per_period() -> None:
    changes = simulate(lambda time_s: 33 + 30 * math.sin(time_s / 300 * 2 * math.pi), 900)
    assert max(size for _, size in changes) == 3
    assert turns(changes, 1) <= 7


def test_the_bounds_hold() -> None:
    changes = simulate(lambda time_s: 1000 if time_s < 40 else 0, 200, bounds=(2, 3))
    assert [size for _, size in changes] == [3, 2]


def test_a_busy_engine_asks_for_help_only_where_requests_could_share_it() -> None:
    busy = lambda time_s: 4.0  # noqa: E731  (every engine that there is)
    assert simulate(lambda time_s: 1.0, 60, busy=busy) == [], "one request at a time"
    assert simulate(lambda time_s: 3.0, 60, busy=busy)[-1][1] == 3, "never more replicas than requests"
    assert simulate(lambda time_s: 3.0, 60, busy=busy, spec=AutoscalingSpec(preset="throughput")) == []


def test_a_pool_sleeps_when_idle_and_is_woken_by_a_request_that_waits() -> None:
    spec = AutoscalingSpec(scale_to_zero_after_s=30, downscale_delay_s=10)
    changes = simulate(
        lambda time_s: 5.0 if time_s < 20 else 0.0,
        140,
        spec=spec,
        bounds=(0, 3),
        target=1,
        queued=lambda time_s: 1.0 if 100 <= time_s < 104 else 0.0,
    )
    assert [size for _, size in changes] == [0, 1, 0]
    asleep, woken, again = (time_s for time_s, _ in changes)
    assert 50 <= asleep <= 53
    assert woken == pytest.approx(100, abs=0.2)
    assert again >= woken + 30, "a replica that was just woken is not put to sleep for its empty past"


def test_rare_requests_that_no_look_meets_keep_a_pool_awake() -> None:
    spec = AutoscalingSpec(scale_to_zero_after_s=5)
    assert simulate(lambda time_s: 0.0, 60, spec=spec, bounds=(0, 2), target=1, rate=lambda time_s: 0.5) == []


def test_a_new_controller_takes_nothing_away_before_it_has_looked_long_enough() -> None:
    changes = simulate(lambda time_s: 1.0, 120, target=4)
    assert [size for _, size in changes] == [1]
    assert changes[0][0] >= 60


def test_a_deployment_that_reports_nothing_is_scaled_by_what_serve_sees() -> None:
    scaler = Scaler(target_ongoing=2, target_busy=0, upscale_delay_s=0, downscale_delay_s=0, scale_to_zero_after_s=0)
    context = AutoscalingContext(
        deployment_id=None, deployment_name="d", app_name="p", current_num_replicas=1, target_num_replicas=1,
        running_replicas=[], total_num_requests=6.0, total_queued_requests=0.0, aggregated_metrics={}, raw_metrics={},
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=9, policy_state={}, last_scale_up_time=None,
        last_scale_down_time=None, current_time=0.0, config=None,
    )  # fmt: skip
    assert scaler(context) == (3, {})


def test_the_policy_needs_nothing_of_ours_where_it_is_unpickled() -> None:
    made = AutoscalingPolicy(policy_function="maas_ray.serve.controller.autoscaling:Scaler")
    script = """
import sys
import ray.cloudpickle as pickle
kind = pickle.loads(sys.stdin.buffer.read())
kind(target_ongoing=1, target_busy=0, upscale_delay_s=0, downscale_delay_s=0, scale_to_zero_after_s=0)
sys.exit(any(name.startswith("maas_ray") for name in sys.modules))
"""
    read = subprocess.run(
        [sys.executable, "-c", script], input=made.get_serialized_policy_def(), capture_output=True, timeout=60
    )
    assert read.returncode == 0, read.stderr


def test_a_meter_reports_the_interval_between_two_readings() -> None:
    stats, meter = ReplicaStats(), Meter()
    model = stats.loaded("m", 1, load_s=1.0)
    assert meter.read(stats.snapshot(), 2, now_s=10.0) == {ONGOING: 2.0, BUSY: 0.0, RATE: 0.0}
    for _ in range(40):
        model.ran(1, 1, 0.01)
        model.served(0.0, 0.0, 0.1, 1, 0.0)
    model.finished("failed", 1.0, 1, 0.0)
    seen = meter.read(stats.snapshot(), 0, now_s=10.5)
    assert seen == pytest.approx({ONGOING: 10.0, BUSY: 0.8, RATE: 82.0})
    assert meter.read(stats.snapshot(), 3, now_s=11.0) == {ONGOING: 3.0, BUSY: 0.0, RATE: 0.0}


def test_a_target_that_no_replica_can_exceed_is_refused() -> None:
    batching = {"max_batch_size": 4, "max_queued_requests": 4}
    pool = PoolSpec.model_validate({"models": [{"name": "m"}], "batching": batching, "autoscaling": {"preset": "throughput"}})  # fmt: skip
    assert pool.scaling.target_ongoing < 8
    with pytest.raises(ValidationError, match="target_ongoing 8 is never exceeded"):
        PoolSpec.model_validate({"models": [{"name": "m"}], "batching": batching, "autoscaling": {"target_ongoing": 8}})


@pytest.mark.parametrize(("num_replicas", "num_looks"), [(1, 100), (100, 100), (500, 20)])
def test_the_reports_of_many_replicas_are_read_less_often(num_replicas: int, num_looks: int) -> None:
    scaler, looks = Scaler(**AutoscalingSpec().resolve(64, 576).scaler_options()), 0

    def metrics() -> dict[str, dict[int, float]]:
        nonlocal looks
        looks += 1
        return {ONGOING: dict.fromkeys(range(num_replicas), 1.0)}

    for tick in range(100):
        context = AutoscalingContext(
            deployment_id=None, deployment_name="maas_replica", app_name="p", current_num_replicas=num_replicas,
            target_num_replicas=num_replicas, running_replicas=[], total_num_requests=0.0, total_queued_requests=0.0,
            aggregated_metrics=metrics, raw_metrics=None, capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=1000, policy_state={}, last_scale_up_time=None, last_scale_down_time=None,
            current_time=tick * TICK_S, config=None,
        )  # fmt: skip
        scaler(context)
    assert abs(looks - num_looks) <= 1


def test_the_reports_of_a_pool_are_bounded_whatever_its_size() -> None:
    assert [report_interval_s(number) for number in (1, 100, 200, 500)] == [0.5, 0.5, 1.0, 2.5]
    bounds = ReplicaRange(min=1, max=500)
    config = autoscaling_config(AutoscalingSpec(preset="latency").resolve(64, 576), bounds)
    assert bounds.max / config.metrics_interval_s <= MAX_REPORTS_PER_S
