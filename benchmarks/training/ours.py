"""maas-ray as it is used: a cluster of its own, `maas-ray train`, and when each logged step was done."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from maas_ray.cluster import load_state
from maas_ray.spec import load_spec
from maas_ray.train.callbacks.tensorboard import PREFIX
from maas_ray.train.spec.train import TrainSpec

COMMAND_TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Timed:
    """One run, ours or a peer's."""

    started: float
    """Seconds since 1970: when its command was started."""
    done: Mapping[int, float]
    """By step: when it was done on all ranks, in seconds since 1970."""
    ended: float
    result: Mapping[str, Any]
    """What it printed or wrote."""

    @property
    def first_step_s(self) -> float:
        """From the command to the end of the first step."""
        return self.done[1] - self.started


@dataclass(frozen=True)
class Job:
    """A spec on disk, its store, and the data it was prepared from."""

    spec: TrainSpec
    path: Path


@contextlib.contextmanager
def cluster(directory: Path, num_cpus: int) -> Iterator[Path]:
    """A cluster with a state directory of its own, which is yielded; ended with all of its processes."""
    home = directory / "home"
    command("up", "--state-dir", str(home), "--num-cpus", str(num_cpus), "--port", "0", "--dashboard-port", "0")
    try:
        yield home
    finally:
        command("down", "--state-dir", str(home), "--drain-timeout-s", "0")


def environment(home: Path) -> dict[str, str]:
    """What a program needs to join the cluster by itself."""
    state = load_state(home)
    if state is None:
        raise RuntimeError(f"no cluster is recorded in {home}")
    return {**os.environ, **state.environment, "RAY_ADDRESS": state.address}


def write_job(directory: Path, name: str, fields: Mapping[str, Any]) -> Job:
    """A spec with the store of this benchmark."""
    path = directory / f"{name}.yaml"
    path.write_text(yaml.safe_dump({**fields, "run": name, "storage": {"uri": str(directory / "store")}}))
    return Job(load_spec(TrainSpec, path), path)


def train(job: Job, home: Path, run: str, overrides: Mapping[str, Any] | None = None) -> Timed:
    """Trains a run from the command line to its end."""
    changed = {"run": run, **(overrides or {})}
    sets = [part for name, value in changed.items() for part in ("--set", f"{name}={json.dumps(value) if not isinstance(value, str) else value}")]  # fmt: skip
    started = time.time()
    result = command("train", str(job.path), "--state-dir", str(home), *sets)
    ended = time.time()
    return Timed(started, _logged(Path(job.spec.storage.uri) / PREFIX / run), ended, result)


def evaluate(job: Job, run: str) -> dict[str, Any]:
    """Figures on the test split."""
    return command("evaluate", run, "--store", job.spec.storage.uri)


def command(*arguments: str) -> dict[str, Any]:
    """Runs a command of maas-ray and returns its JSON."""
    argv = [str(Path(sys.executable).with_name("maas-ray")), *arguments, "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stderr[-2000:]}{done.stdout[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _logged(directory: Path) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.wall_time for event in events.Scalars("train/loss")}
