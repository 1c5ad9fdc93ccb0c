"""Kill -9 of a worker or of the driver, at any time: the resumed run is bit for bit the undisturbed one."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster
from tests.support.paths import STEPS, FinishedRun, table_spec
from tests.support.root import ROOT
from tests.support.runs import outcome, train_workers, until

JOB = ROOT / "jobs" / "train.py"
WAIT_S = 180
CHANGES: dict[str, Any] = {"checkpoint": {"every_steps": 8}}


@contextmanager
def _driver(spec: TrainSpec, cluster: RayCluster, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [sys.executable, str(JOB), "--spec", str(file)]
    environment = {**os.environ, **cluster.env}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)


_until = partial(until, wait_s=WAIT_S)


def _outcome(store: ObstoreStore, run: str = "r") -> tuple[list[Any], str]:
    """Every logged loss, and the digest of the final weights and optimizer state."""
    assert list_checkpoints(store, checkpoints_prefix(run))[-1] == STEPS
    losses, digest = outcome(store, run)
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    return losses, digest


def _kill_a_worker(cluster: RayCluster, store: ObstoreStore, others: set[int]) -> int:
    """Kills a worker of the run that starts now, once it has checkpoints; returns the step of the newest one."""
    _until(lambda: len(train_workers(cluster) - others) == 2, "pair of workers")
    pair = train_workers(cluster) - others
    _until(lambda: len(list_checkpoints(store, checkpoints_prefix("r"))) >= 2, "checkpoint")
    os.kill(max(pair), signal.SIGKILL)
    return list_checkpoints(store, checkpoints_prefix("r"))[-1]


def test_a_run_whose_worker_is_killed_ends_with_the_same_bits(
    ray_cluster: RayCluster, tmp_path: Path, finished_run: FinishedRun
) -> None:
    storage = StorageSpec(uri=f"file://{tmp_path}/store")
    store = open_store(storage)
    # The undisturbed run reads when it needs to and records nothing: that changes no bit either.
    performance = {"prefetch": 2, "profile": {"first_step": 3, "steps": 2}, "peak_tflops": 1.0}
    spec = table_spec(storage, "r", finished_run.table, **CHANGES, performance=performance)
    with ThreadPoolExecutor(1) as thread:
        killed_at = thread.submit(_kill_a_worker, ray_cluster, store, train_workers(ray_cluster))
        result = run_training(spec)
    assert killed_at.result() < STEPS, "the worker was killed too late to prove anything"
    assert _outcome(store) == _outcome(finished_run.store, "table")
    events = EventAccumulator(result.tensorboard).Reload()
    assert {"train/loss", "train/lr", "train/samples_per_s", "train/mfu"} <= set(events.Tags()["scalars"])
    traces = [found.key for found in store.scan("runs/r/profile")]
    assert traces == [f"runs/r/profile/step-3-rank-{rank}.json.gz" for rank in range(2)]
    assert max(event.step for event in events.Scalars("train/loss")) == STEPS


@pytest.mark.fault
def test_a_run_whose_worker_and_then_driver_are_killed_ends_with_the_same_bits(
    ray_cluster: RayCluster, tmp_path: Path, finished_run: FinishedRun
) -> None:
    storage = StorageSpec(uri=f"file://{tmp_path}/store")
    store = open_store(storage)
    spec = table_spec(storage, "r", finished_run.table, **CHANGES)
    others = train_workers(ray_cluster)
    with _driver(spec, ray_cluster, tmp_path) as process:
        killed_at = _kill_a_worker(ray_cluster, store, others)
        # Ray starts the group again by itself; the driver goes as soon as the new one has got further.
        _until(lambda: list_checkpoints(store, checkpoints_prefix("r"))[-1] > killed_at, "checkpoint after the restart")
        process.kill()
        process.wait(timeout=30)
    assert list_checkpoints(store, checkpoints_prefix("r"))[-1] < STEPS, (
        "the driver was killed too late to prove anything"
    )
    assert Runs(store).get("r").status == "started"
    run_training(spec, resume=True)
    assert _outcome(store) == _outcome(finished_run.store, "table")
