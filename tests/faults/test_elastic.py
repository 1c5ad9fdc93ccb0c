"""Ranks and nodes that join, leave and hang while a run trains, on a real cluster: where it continues, and with which bits."""

import os
import random
import re
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.core.generated import autoscaler_pb2

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.errors import Preempted, RanksMissing
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.loop.progress import Progress
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.run import RunResult, run_training
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster
from tests.faults.test_serving_ledger import second_node
from tests.support.paths import digits_spec
from tests.support.runs import outcome, train_workers, until
from tests.support.table import Table, write_table

WAIT_S = 240
RUN_S = 75.0
"""About as long as an undisturbed run is to train on this machine as busy as it is."""
KILL_EVERY_S = 20.0

Attempts = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Reference:
    """A run of two workers that nothing disturbed."""

    table: Table
    steps: int
    every: int
    """Steps between checkpoints."""
    rate: float
    """Steps per second."""
    losses: list[tuple[int, float]]
    digest: str


def _spec(store: ObstoreStore, run: str, table: Table, num_steps: int, every: int, **changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "data": table.data,
        "epochs": None,
        "steps": num_steps,
        "log_every": every // 10,
        "validate_every": num_steps,
        "checkpoint": {"every_steps": every},
        "optimizer": {"lr": 0.001},
        "seed": 5,
    }
    return digits_spec(StorageSpec(uri=store.uri), run, **{**fields, **changes})


def _reference_spec(store: ObstoreStore, reference: Reference, **changes: Any) -> TrainSpec:
    return _spec(store, "r", reference.table, reference.steps, reference.every, **changes)


@pytest.fixture(scope="module")
def reference(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp("reference")
    store = open_store(f"file://{directory}/store")
    table = write_table(directory)
    reports: list[Progress] = []
    run_training(_spec(store, "probe", table, 400, 400), on_progress=reports.append)
    rate = max(report.samples_per_s or 0.0 for report in reports) / 64
    every = max(100, round(rate * RUN_S / 15))
    spec = _spec(store, "undisturbed", table, 15 * every, every)
    assert run_training(spec).step == 15 * every
    losses, digest = outcome(store, "undisturbed")
    assert len(losses) >= 150
    return Reference(table, 15 * every, every, rate, losses, digest)


_until = partial(until, wait_s=WAIT_S)


def _newest(store: ObstoreStore, run: str) -> int:
    return max(list_checkpoints(store, checkpoints_prefix(run)), default=0)


def _trains_on(store: ObstoreStore, run: str, steps: int) -> None:
    """Returns when the run has committed that many further steps."""
    before = _newest(store, run)
    _until(lambda: _newest(store, run) >= before + steps, "progress")


@contextmanager
def _training(spec: TrainSpec, *, resume: bool = False) -> Iterator[Future[RunResult]]:
    with ThreadPoolExecutor(1) as thread:
        yield thread.submit(run_training, spec, resume=resume)


def _kill_raylet(parent: int) -> None:
    """Kills the raylet that a process has started: all that its node ran ends with it."""
    for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        if Path(f"/proc/{child}/comm").read_text().strip() == "raylet":
            return os.kill(int(child), signal.SIGKILL)
    raise AssertionError(f"process {parent} has started no raylet")


def _attempts(store: ObstoreStore, run: str) -> Attempts:
    return list(Runs(store).get(run).attempts)


def _redone(attempts: Attempts) -> list[int]:
    """Steps that each attempt after the first one did again. How far a lost one was is known to a second."""
    pairs = [(one, two) for one, two in pairwise(attempts) if two["first_step"] is not None]
    return [max(0, one["reached"] - two["first_step"]) for one, two in pairs if one["reached"] is not None]


@pytest.mark.fault
@pytest.mark.timeout(1800)
def test_a_run_whose_ranks_are_killed_every_20_s_ends_with_the_same_bits(
    ray_cluster: RayCluster, tmp_path: Path, reference: Reference
) -> None:
    store = open_store(f"file://{tmp_path}/store")
    seed = random.randrange(1 << 30)
    dice = random.Random(seed)
    spec = _reference_spec(store, reference, workers={"count": 2, "max_restarts": 10})
    kills: list[tuple[int, int]] = []
    with _training(spec) as result:
        _until(lambda: len(train_workers(ray_cluster)) == 2, "pair of workers")
        next_kill = time.monotonic() + KILL_EVERY_S
        while not result.done():
            if time.monotonic() < next_kill:
                time.sleep(0.05)
                continue
            next_kill += KILL_EVERY_S
            # Where starting alone takes so long, killing each time would leave no time to train.
            is_training = bool(_newest(store, "r") > (kills[-1][1] if kills else 0))
            victims = sorted(train_workers(ray_cluster))
            if victims and (is_training or dice.random() < 0.3):
                os.kill(dice.choice(victims), signal.SIGKILL)
                kills.append((int(is_training), _newest(store, "r")))
    result.result()
    attempts = _attempts(store, "r")
    redone = _redone(attempts)
    print(f"seed {seed}: {len(kills)} kills (training, committed): {kills}; redone of {reference.every}: {redone}")  # noqa: T201
    assert sum(training for training, _ in kills) >= 2, "the run was too short to prove anything"
    assert outcome(store, "r") == (reference.losses, reference.digest)
    # A commit that is in flight when a rank dies is lost with it: that is the second beside the interval.
    assert max(redone) <= reference.every + reference.rate


@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_a_run_follows_the_cluster_at_committed_steps(
    ray_cluster: RayCluster, tmp_path: Path, reference: Reference
) -> None:
    store = open_store(f"file://{tmp_path}/store")
    # Of five of the eight CPUs that each node has, so that a node holds one worker.
    workers = {"min": 1, "max": 2, "cpus": 5, "scale_up_interval_s": 3.0}
    spec = _reference_spec(store, reference, workers=workers)
    with _training(spec) as result:
        with second_node(ray_cluster, tmp_path / "first.log") as (node, _):
            _trains_on(store, "r", reference.every)
            assert len(train_workers(ray_cluster)) == 2
            client = ray._raylet.GcsClient(address=ray_cluster.address)
            reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
            assert client.drain_node(node, reason, "a test", int(time.time() * 1000) + 120_000)[0]
            _until(lambda: len(_attempts(store, "r")) == 1, "end of the attempt with the node that is drained")
            _trains_on(store, "r", reference.every)
            assert len(train_workers(ray_cluster)) == 1
        with second_node(ray_cluster, tmp_path / "second.log") as (_, process):
            _until(lambda: len(_attempts(store, "r")) == 2, "end of the attempt with too few workers")
            _trains_on(store, "r", reference.every)
            assert len(train_workers(ray_cluster)) == 2
            _kill_raylet(process.pid)
            _until(lambda: len(_attempts(store, "r")) == 3, "end of the attempt with the node that was lost")
    result.result()
    attempts = _attempts(store, "r")
    redone = _redone(attempts)
    print(f"redone: {redone}; {attempts}")  # noqa: T201
    assert [attempt["workers"] for attempt in attempts] == [2, 1, 2, 1]
    assert "is draining" in attempts[0]["reason"]
    assert "resources for 2 workers are free" in attempts[1]["reason"]
    assert redone[:2] == [0, 0], "a planned change redoes nothing"
    assert all(attempts[number]["committed"] == attempts[number]["reached"] for number in (0, 1))
    assert redone[2] <= reference.every + reference.rate
    losses, digest = outcome(store, "r")
    assert digest != reference.digest, "another number of workers adds in another order"
    assert [step for step, _ in losses] == [step for step, _ in reference.losses]
    np.testing.assert_allclose(
        [loss for _, loss in losses], [loss for _, loss in reference.losses], rtol=0.02, atol=0.02
    )


@pytest.mark.fault
@pytest.mark.timeout(1200)
def test_a_run_that_is_asked_to_leave_commits_first_and_ends_with_the_same_bits(
    ray_cluster: RayCluster, tmp_path: Path, reference: Reference
) -> None:
    store = open_store(f"file://{tmp_path}/store")
    spec = _reference_spec(store, reference, checkpoint={"every_steps": reference.steps})
    raised: list[BaseException] = []
    reports: list[Progress] = []

    def ask() -> None:
        try:
            _until(lambda: reports, "first report")
            os.kill(min(train_workers(ray_cluster)), signal.SIGTERM)
            _until(lambda: _newest(store, "r") > 0, "checkpoint on notice")
            _until(lambda: reports[-1].step > _newest(store, "r"), "report of the second attempt")
        except BaseException as error:
            raised.append(error)
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Preempted, match=r"asked to end \(SIGTERM\); step \d+ is committed"):
        run_training(spec, on_progress=reports.append)
    asking.join(timeout=60)
    assert raised == []
    stopped = Runs(store).get("r")
    assert stopped.status == "stopped"
    result = run_training(spec, resume=True)
    assert result.step == reference.steps
    attempts = _attempts(store, "r")
    print(f"redone: {_redone(attempts)}; {attempts}")  # noqa: T201
    assert re.search(r"rank \d received SIGTERM", attempts[0]["reason"])
    assert len(attempts) == 3
    assert _redone(attempts) == [0, 0]
    assert 0 < attempts[1]["first_step"] < attempts[2]["first_step"] < reference.steps
    assert outcome(store, "r") == (reference.losses, reference.digest)


@pytest.mark.fault
@pytest.mark.timeout(600)
def test_a_hanging_rank_is_named_within_a_minute(ray_cluster: RayCluster, tmp_path: Path, reference: Reference) -> None:
    store = open_store(f"file://{tmp_path}/store")
    spec = _reference_spec(store, reference, steps=10**7, workers={"count": 2, "max_restarts": 0})
    with _training(spec) as result:
        _until(lambda: _newest(store, "r") > 0, "checkpoint")
        victim = random.choice(sorted(train_workers(ray_cluster)))
        os.kill(victim, signal.SIGSTOP)
        stopped_s = time.monotonic()
        with pytest.raises(
            RanksMissing, match=rf"rank \d is missing: no heartbeat for \d+ s; process {victim} on"
        ) as error:
            result.result(timeout=120)
        took_s = time.monotonic() - stopped_s
    print(f"named after {took_s:.0f} s: {error.value}")  # noqa: T201
    assert took_s < 60
    _until(lambda: not Path(f"/proc/{victim}").exists(), "end of the process that hung")
    _until(lambda: ray.available_resources()["CPU"] == ray.cluster_resources()["CPU"], "CPU that it held")
