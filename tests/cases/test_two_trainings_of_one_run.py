"""Two concurrent `train` commands of one run name both exited with 0 and shared one log. On a real cluster."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.errors import Conflict
from maas_ray.store.lease import BOUND_S, holder_of
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.train.records.runs import Runs, checkpoints_prefix, run_prefix
from maas_ray.train.run import run_training
from maas_ray.train.spec.train import TrainSpec
from tests.conftest import RayCluster
from tests.support.paths import table_spec
from tests.support.root import ROOT
from tests.support.runs import outcome, until
from tests.support.table import write_table

STEPS = 1200
JOB = ROOT / "jobs" / "train.py"

pytestmark = [pytest.mark.fault, pytest.mark.timeout(480)]


@contextmanager
def _driver(spec: TrainSpec, cluster: RayCluster, tmp_path: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(spec.model_dump(mode="json")))
    command = [sys.executable, str(JOB), "--spec", str(file), *flags]
    process = subprocess.Popen(
        command, env={**os.environ, **cluster.env}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait(timeout=30)
        if process.stderr is not None:
            process.stderr.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=lambda end: end.name)
def test_the_second_is_refused_and_a_dead_or_frozen_one_is_followed(
    ray_cluster: RayCluster, tmp_path: Path, end: signal.Signals
) -> None:
    storage = StorageSpec(uri=f"file://{tmp_path}/store")
    store, table = open_store(storage), write_table(tmp_path)
    spec = table_spec(storage, "r", table, checkpoint={"every_steps": 8}, steps=STEPS, log_every=10)
    with _driver(spec, ray_cluster, tmp_path) as first:
        until(lambda: list_checkpoints(store, checkpoints_prefix("r")), "checkpoint", wait_s=240)
        for resume in (False, True):
            began = time.monotonic()
            with pytest.raises(Conflict, match=rf"(in use|held) by process {first.pid} on "):
                run_training(spec, resume=resume)
            assert time.monotonic() - began < 60
        os.kill(first.pid, end)
        reached = list_checkpoints(store, checkpoints_prefix("r"))[-1]
        assert reached < STEPS, "the owner ended too late to prove anything"
        began = time.monotonic()
        result = run_training(spec, resume=True)
        assert (end == signal.SIGKILL) or time.monotonic() - began > BOUND_S
        os.kill(first.pid, signal.SIGCONT if end == signal.SIGSTOP else 0) if first.poll() is None else None
        if end == signal.SIGSTOP:
            _, said = first.communicate(timeout=240)
            assert first.returncode == 1
            assert "error[conflict]" in said
    assert result.step == STEPS
    run = Runs(store).get("r")
    assert run.status == "finished"
    assert run.error is None, "the first one wrote nothing into the run of the second"
    losses, _ = outcome(store)
    assert [step for step, _ in losses] == list(range(10, STEPS + 1, 10))
    assert holder_of(store, run_prefix("r")) is None
