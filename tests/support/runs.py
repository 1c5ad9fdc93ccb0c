"""Runs on a cluster, seen from outside: waiting for what they do, their processes, what they end with."""

import time
from collections.abc import Callable

from ray.util.state import list_actors

from maas_ray.checkpoint.catalog import open_checkpoint, read_saved
from maas_ray.checkpoint.index import read_index, tensors_digest
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import checkpoints_prefix
from tests.conftest import RayCluster


def until(condition: Callable[[], object], what: str, *, wait_s: float) -> None:
    """Returns when a condition holds."""
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {wait_s} s"
        time.sleep(0.05)


def train_workers(cluster: RayCluster) -> set[int]:
    """Process ids of the ranks that live."""
    filters = [("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")]
    actors = list_actors(cluster.dashboard_url, filters=filters, timeout=30)
    return {int(actor.pid) for actor in actors}


def outcome(store: ObstoreStore, run: str = "r") -> tuple[list[tuple[int, float]], str]:
    """Every logged step and its loss, and the digest of the final weights and optimizer state."""
    committed = open_checkpoint(store, checkpoints_prefix(run))
    history = read_saved(committed).history
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    return losses, tensors_digest(read_index(committed))
