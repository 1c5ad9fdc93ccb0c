"""Training on a network of hosts: specs, the command on a chosen host, and what the store says of a run."""

import json
import subprocess
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import yaml

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.errors import NotFound
from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from maas_ray.train.records.runs import Runs, checkpoints_prefix
from tests.support.hosts.host import Host
from tests.support.hosts.network import Network
from tests.support.hosts.served import store_uri

LAYOUTS: dict[str, dict[str, Any]] = {"data": {}, "data x tensor": {"tp": 2, "dp_replicate": 2}}
TENSOR_PLAN = {"body.*": "colwise"}


class Training:
    """`maas-ray train` on one host, in the background.

    Args:
        network: the hosts.
        host: where the command runs.
        run: whose spec `write_run` has written.
        words: further words of the command line.
    """

    def __init__(self, network: Network, host: Host, run: str, *words: str) -> None:
        self.run = run
        self.began_s = time.monotonic()
        self._log = f"{run}-{time.monotonic_ns()}.log"
        self._host = host
        command = f"maas-ray train --json {network.shared / run}.yaml {' '.join(words)}"
        self._process = host.start(
            f". ~/maas-ray.env && export RAY_ADDRESS={network.hosts[0].address}:6379 && exec {command}", self._log
        )

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            for pid in self._host.pids("maas-ray", "train", self.run) if self._host.is_up else []:
                self._host.kill(pid)
            self._process.kill()
        self._process.wait(30)

    @property
    def is_over(self) -> bool:
        """Whether the command has ended."""
        return self._process.poll() is not None

    @property
    def said(self) -> str:
        """What it has printed so far, on both streams."""
        return (self._host.home / self._log).read_text()

    def wait(self, timeout_s: float = 600.0) -> dict[str, Any]:
        """Its JSON document. It must end well."""
        try:
            code = self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.run} has not ended after {timeout_s:g} s: {self.said[-3000:]}") from None
        assert code == 0, self.said[-3000:]
        # Ray writes what befell a node to stderr, at times after the command's own last line.
        (*_, line) = (line for line in self.said.splitlines() if line.startswith("{"))
        document: dict[str, Any] = json.loads(line)
        return document


def write_run(
    network: Network, run: str, *, steps: int, every: int, storage: Mapping[str, Any] | None = None, **changes: Any
) -> None:
    """Writes the spec of a run of four ranks on real scans, dropout on, where all hosts see it.

    Args:
        network: the hosts.
        run: its name.
        steps: of the whole run.
        every: steps between checkpoints.
        storage: None: the store in the directory that all hosts share.
        changes: further fields of the spec.
    """
    fields = {
        "run": run,
        "model": {"name": "mlp", "params": {"size": 1, "dropout": 0.2}},
        "data": {
            "uri": "sklearn:digits",
            "task": "classification",
            "cleaning": {"tensor": {"scaling": "min_max"}},
        },
        "optimizer": {"lr": 0.001},
        "steps": steps,
        "log_every": max(1, every // 10),
        "validate_every": steps,
        "checkpoint": {"every_steps": every},
        "seed": 5,
        "workers": {"count": 4, "max_restarts": 10, "placement_timeout_s": 600},
        "storage": dict(storage or {"uri": store_uri(network)}),
    }
    (network.shared / f"{run}.yaml").write_text(yaml.safe_dump({**fields, **changes}))


def store_of(network: Network) -> ObstoreStore:
    """The store in the directory that all hosts share."""
    return open_store(StorageSpec(uri=store_uri(network)))


def newest(store: ObstoreStore, run: str) -> int:
    """Its newest committed step; 0: there is none."""
    return max(list_checkpoints(store, checkpoints_prefix(run)), default=0)


def attempts(store: ObstoreStore, run: str) -> list[Mapping[str, Any]]:
    """The attempts of a run that are over, as it has written them down; none of one that does not exist yet."""
    try:
        return list(Runs(store).get(run).attempts)
    except NotFound:
        return []


def redone(found: list[Mapping[str, Any]]) -> list[int]:
    """Steps that each attempt after the first did again. How far a lost one was is known to a second."""
    pairs = [(one, two) for one, two in pairwise(found) if two["first_step"] is not None and one["reached"] is not None]
    return [max(0, one["reached"] - two["first_step"]) for one, two in pairs]


def until(condition: Callable[[], object], what: str, *, training: Training, wait_s: float = 300.0) -> None:
    """Returns when a condition holds; fails if the command ends badly before it does, or if it takes too long."""
    deadline = time.monotonic() + wait_s
    while not condition():
        if training.is_over:
            training.wait()
        assert time.monotonic() < deadline, f"no {what} within {wait_s:g} s: {training.said[-2000:]}"
        time.sleep(0.1)


def ranks_on(host: Host) -> list[int]:
    """Processes of ranks on a host."""
    return host.pids("ray::RayTrainWorker")
