"""Training runs from Python: functions that train, evaluate and publish, and the handle of a run."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maas_ray.api.specs import read_spec
from maas_ray.api.stores import opened
from maas_ray.store.objects import ObjectStore

if TYPE_CHECKING:
    from torch import nn

    from maas_ray.registry.models import Version
    from maas_ray.train.loop.progress import Progress
    from maas_ray.train.records.run_index import Summary
    from maas_ray.train.spec.train import TrainSpec
    from maas_ray.train.validation.load_model import Evaluation

Checkpoint = int | Literal["newest", "best"] | None
"""A step, `newest` or `best`; None: `checkpoint.use` of the run's spec."""
Weights = Literal["ema", "raw"] | None
"""`ema`: the moving average of the weights; `raw`: the weights; None: the average if the run keeps it."""


@dataclass(frozen=True)
class SavedCheckpoint:
    """A committed checkpoint of a run."""

    step: int
    committed_s: float
    """Seconds since 1970."""
    num_bytes: int
    metrics: Mapping[str, float]
    is_pinned: bool
    """Whether retention keeps it: a version was exported from it, or a user pinned it."""


class Run:
    """A training run in a store. Every property reads the store, so that a run can be watched while it trains.

    Args:
        id: id of the run.
        store: an open store, its URI, or None for the default one.

    Raises:
        NotFound: the store has no such run.
    """

    def __init__(self, id: str, *, store: ObjectStore | str | None = None) -> None:
        from maas_ray.train.records.runs import Runs

        self.id = id
        self.store = opened(store)
        self._runs = Runs(self.store)
        self._runs.get(id)

    def __repr__(self) -> str:
        return f"Run({self.id!r}, store={self.store.uri!r})"

    @property
    def spec(self) -> "TrainSpec":
        """The spec with which the run was started."""
        return self._runs.get(self.id).spec

    @property
    def status(self) -> str:
        """`started`, `finished`, `failed` or `stopped`."""
        return self._runs.get(self.id).status

    @property
    def error(self) -> str | None:
        """The error of a failed run, or None."""
        return self._runs.get(self.id).error

    @property
    def step(self) -> int | None:
        """Optimizer step of the newest committed checkpoint, or None."""
        return self._runs.get(self.id).step

    @property
    def metrics(self) -> dict[str, float]:
        """The newest loss and validation metrics."""
        return dict(self._runs.get(self.id).metrics)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Metrics up to the newest committed checkpoint, oldest first: `{step, loss, lr}` and `{step, validation}`."""
        from maas_ray.checkpoint.catalog import newest_checkpoint, open_checkpoint, read_saved
        from maas_ray.train.records.runs import checkpoints_prefix

        prefix = checkpoints_prefix(self.id)
        step = newest_checkpoint(self.store, prefix)
        return [] if step is None else read_saved(open_checkpoint(self.store, prefix, step)).history

    @property
    def checkpoints(self) -> list[SavedCheckpoint]:
        """The committed checkpoints, oldest first."""
        from maas_ray.checkpoint.catalog import describe
        from maas_ray.train.records.runs import checkpoints_prefix

        return [
            SavedCheckpoint(
                each["step"], each["committed_s"], each["num_bytes"], each["metrics"] or {}, each["is_pinned"]
            )
            for each in describe(self.store, checkpoints_prefix(self.id))
            if not each.get("error")
        ]

    @property
    def tensorboard(self) -> str:
        """The value of `tensorboard --logdir`."""
        from maas_ray.train.callbacks.tensorboard import location

        return location(self.store, self.id)

    def load_model(self, checkpoint: Checkpoint = None, *, weights: Weights = None) -> "nn.Module":
        """Loads the trained module of a checkpoint on the CPU, in evaluation mode. Its input is preprocessed rows.

        Raises:
            NotFound: the checkpoint does not exist.
            ObjectCorrupt: a part is missing, truncated or altered.
        """
        from maas_ray.train.validation.load_model import load_trained

        return load_trained(self.store, self.id, checkpoint, weights=weights).net

    def evaluate(
        self,
        split: Literal["train", "validation", "test"] = "test",
        *,
        checkpoint: Checkpoint = None,
        weights: Weights = None,
    ) -> "Evaluation":
        """Evaluates a checkpoint on a split, in this process."""
        from maas_ray.train.validation.evaluate_run import evaluate_run

        return evaluate_run(self.store, self.id, split, checkpoint, weights)

    def publish(
        self,
        model: str,
        *,
        checkpoint: Checkpoint = None,
        weights: Weights = None,
        alias: str | None = None,
        token: str | None = None,
    ) -> "Version":
        """Exports a checkpoint to ONNX, compares both in the parity gate and publishes the next version of a model.

        Args:
            model: name of the model.
            checkpoint: a step, `newest` or `best`; None: `checkpoint.use` of the spec.
            weights: `ema` or `raw`; None: the moving average if the run keeps it.
            alias: alias to point at the version, such as `production`.
            token: idempotency token; a repeated publish with the same token returns the version of the first one.

        Raises:
            GateError: the exported graph differs from the trained model; nothing is published.
        """
        from maas_ray.optimize.publish import export_run
        from maas_ray.registry.models import Registry, check_name

        check_name(model, "model")
        exported = export_run(self.store, self.id, checkpoint, weights=weights)
        registry = Registry(self.store)
        version = registry.publish(model, exported.bundle_id, token=token)
        return registry.promote(model, version.version, alias) if alias else version


def train(
    spec: "TrainSpec | Mapping[str, Any] | str | Path",
    overrides: Mapping[str, Any] | None = None,
    *,
    resume: bool = False,
    extend: Mapping[str, int] | None = None,
    on_progress: "Callable[[Progress], None] | None" = None,
) -> Run:
    """Trains a run on the connected cluster and returns once the run has ended; see `connect`.

    Args:
        spec: a `TrainSpec`, a mapping of its fields, or the path of a YAML file.
        overrides: values by field path, such as `{"optimizer.lr": 0.1}`.
        resume: continue an existing run from its newest committed checkpoint.
        extend: `{"epochs": N}` or `{"steps": N}`: continue an existing run, also a finished one, to this larger total
            length.
        on_progress: called with the latest progress report, in a thread of this process.

    Raises:
        SpecError: the spec is invalid.
        Conflict: the run exists and `resume` is False, or another process is training it.
        ClusterError: this process is not connected to a cluster.
        TrainingFailed: workers failed more than `workers.max_restarts` times in a row.
    """
    from maas_ray.api.clusters import require_connection
    from maas_ray.train.run import run_training
    from maas_ray.train.spec.train import TrainSpec

    loaded = read_spec(TrainSpec, spec, overrides)
    require_connection()
    result = run_training(loaded, resume=resume, extend=extend, on_progress=on_progress)
    from maas_ray.store.objects import open_store

    return Run(result.run, store=open_store(loaded.storage))


def list_runs(*, store: ObjectStore | str | None = None) -> "list[Summary]":
    """Lists the runs of a store, newest first, without those with a damaged record (see `maas-ray fsck`)."""
    from maas_ray.train.records.runs import Runs

    return Runs(opened(store)).all()


def evaluate(
    run: Run | str,
    split: Literal["train", "validation", "test"] = "test",
    *,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    store: ObjectStore | str | None = None,
) -> "Evaluation":
    """Evaluates a checkpoint of a run on a split, in this process; see `Run.evaluate`."""
    return _run(run, store).evaluate(split, checkpoint=checkpoint, weights=weights)


def publish(
    run: Run | str,
    model: str,
    *,
    checkpoint: Checkpoint = None,
    weights: Weights = None,
    alias: str | None = None,
    token: str | None = None,
    store: ObjectStore | str | None = None,
) -> "Version":
    """Publishes a checkpoint of a run as the next version of a model; see `Run.publish`."""
    return _run(run, store).publish(model, checkpoint=checkpoint, weights=weights, alias=alias, token=token)


def _run(run: Run | str, store: ObjectStore | str | None) -> Run:
    return Run(run, store=store) if isinstance(run, str) else run
