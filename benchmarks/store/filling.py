"""A store with long lists, written through the library's own paths: thousands of versions, models, runs and checkpoints."""

from dataclasses import dataclass

import torch
from obstore.store import MemoryStore

from maas_ray.bundle.format import BundleInfo, Lineage, Signature, TensorSpec, save_bundle
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.registry.models import Registry
from maas_ray.store.manifest import POINTERS, CommitWriter
from maas_ray.store.objects import ObstoreStore
from maas_ray.store.sequence import Sequence
from maas_ray.train.records.run_index import RunIndex, Summary
from maas_ray.train.records.runs import KIND, checkpoints_prefix, run_prefix
from maas_ray.train.spec.train import TrainSpec


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    versions: int
    models: int
    runs: int
    checkpoints: int
    unfinished: int = 0
    """Of the runs, the newest."""


_INFO = BundleInfo(
    signature=Signature(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(-1, 4)),),
        outputs=(TensorSpec(name="prediction", datatype="FP32", shape=(-1, 1)),),
    ),
    task="regression",
    parity={"passed": True},
    metrics={"mse": 0.5},
    lineage=Lineage(run="toy", step=7, checkpoint_digest="c" * 64, data_digest="d" * 64, spec_digest="e" * 64),
)
SPEC = {"uri": "sklearn:digits", "task": "classification"}


def memory_store() -> ObstoreStore:
    """Thousands of small writes to a disk would take most of the time."""
    return ObstoreStore("memory://", MemoryStore())


def run_name(number: int) -> str:
    return f"run-{number:05d}"


def fill(store: ObstoreStore, sizes: Sizes) -> str:
    """Writes everything; each model has a production alias. Returns the id of the bundle of all versions.

    The checkpoints belong to the first run.
    """
    bundle = save_bundle(store, _INFO, b"graph")
    fill_registry(store, bundle, sizes.versions, sizes.models)
    fill_runs(store, sizes.runs, sizes.unfinished)
    for step in range(1, sizes.checkpoints + 1):
        state = Snapshot(step, step * 8, {"model.weight": torch.zeros(2)}, {"seed": 5}, [{"step": 1, "loss": 0.25}])
        save(store, checkpoints_prefix(run_name(0)), state)
    return bundle


def fill_registry(store: ObstoreStore, bundle: str, versions: int, models: int) -> None:
    registry = Registry(store)
    for number in range(versions):
        registry.publish(f"model-{number % models}", bundle, token=f"token-{number}")
    for number in range(models):
        registry.promote(f"model-{number}", 1)


def spec_of(store: ObstoreStore, run: str) -> TrainSpec:
    fields = {"run": run, "model": {"name": "mlp"}, "data": SPEC, "storage": {"uri": store.uri}}
    return TrainSpec.model_validate(fields)


def fill_runs(store: ObstoreStore, runs: int, unfinished: int) -> None:
    """The same objects as `Runs` writes, without a look at the store before each."""
    spec = spec_of(store, "r").model_dump(mode="json")
    summaries = []
    for number in range(runs):
        name, is_finished = run_name(number), number < runs - unfinished
        meta = {"spec": {**spec, "run": name}, "data_digest": "d" * 64, "git_commit": None, "created_s": float(number)}
        CommitWriter(store, run_prefix(name), KIND).commit({**meta, "start": None})
        log = Sequence(store, run_prefix(name))
        record = log.put(None, {"type": "started", "workers": 1}, "")
        if is_finished:
            log.put(record, {"type": "finished", "step": number, "reason": None}, "")
        else:
            store.create(f"{POINTERS}/{checkpoints_prefix(name)}/{number:010d}", b"")
        summaries.append(
            Summary(
                id=name,
                created_s=float(number),
                data_digest="d" * 64,
                status="finished" if is_finished else "started",
                step=number if is_finished else None,
                records=1 + is_finished,
            )
        )
    RunIndex(store).write(summaries)
