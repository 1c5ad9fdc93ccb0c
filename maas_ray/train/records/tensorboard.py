"""Writes TensorBoard scalars and histograms of a run, and collects the history for its checkpoints."""

import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maas_ray.store.objects import ObjectStore
from maas_ray.train.loop.progress import Progress
from maas_ray.train.spec.metrics import finite

if TYPE_CHECKING:
    from torch import Tensor  # readers of a spec need no torch

PREFIX = "tensorboard"


class Journal:
    """Writes the scalars of one run. Only rank 0 has one; `close` it.

    A local store is written directly, so that TensorBoard shows a run while it trains. For an object store
    the event files are in a temporary directory until `publish` uploads them.

    Args:
        store: target store; the files are below `tensorboard/<run>/`.
        run: id of the run.
        first_step: number of completed steps; later entries of a failed attempt are hidden.
        history: history before `first_step`: `{step, loss, lr}` and `{step, validation}`, oldest first.
    """

    def __init__(self, store: ObjectStore, run: str, first_step: int, history: list[dict[str, Any]]) -> None:
        self.history = list(history)
        self._store = store
        self._run = run
        self._scratch = None if store.root else tempfile.TemporaryDirectory(prefix="maas-tensorboard-")
        self._directory = store.root / PREFIX / run if store.root else Path(self._scratch.name)  # type: ignore[union-attr]
        self._first_step = first_step
        self._writer: Any = None

    def write(self, progress: Progress) -> None:
        """Adds one report: `train/loss`, `train/lr`, `train/samples_per_s`, `validation/…`."""
        now = time.time()
        if self._writer is None:
            from torch.utils.tensorboard.writer import (
                SummaryWriter,
            )  # late: its import takes 0.4 s, which must not delay the first step

            self._writer = SummaryWriter(str(self._directory), purge_step=self._first_step + 1, flush_secs=5)
        scalars = {
            "train/loss": progress.loss,
            "train/lr": progress.lr,
            "train/samples_per_s": progress.samples_per_s,
            "train/tokens_per_s": progress.tokens_per_s,
            "train/mfu": progress.mfu,
            "train/epoch": progress.epoch,
            **{f"validation/{name}": value for name, value in progress.metrics.items()},
        }
        validated = progress.step if progress.of_step is None else progress.of_step
        for name, value in scalars.items():
            if value is not None:
                step = validated if name.startswith("validation/") else progress.step
                self._writer.add_scalar(name, value, step, walltime=now)
        if progress.samples:
            self._writer.add_text("validation/samples", progress.samples, validated, walltime=now)
        if progress.loss is not None:
            self.history.append({"step": progress.step, "loss": progress.loss, "lr": progress.lr})
        if progress.metrics:
            self.history.append({"step": validated, "validation": finite(progress.metrics)})

    def write_histograms(self, step: int, values: Iterable[tuple[str, "Tensor"]]) -> None:
        """Writes histograms of each tensor's finite values, after `write` of the same step.

        Args:
            step: number of completed optimizer steps.
            values: names, such as `weights/<name>`, and tensors of any shape on any device.
        """
        for name, value in values:
            finite_values = value.detach().float().flatten()
            finite_values = finite_values[finite_values.isfinite()]
            if finite_values.numel() and self._writer is not None:
                self._writer.add_histogram(name, finite_values.cpu().numpy(), step)

    def publish(self) -> None:
        """Uploads the files to an object store; in a local store they are already visible."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._scratch is not None:
            for path in sorted(self._directory.iterdir()):
                self._store.put(f"{PREFIX}/{self._run}/{path.name}", path.read_bytes())

    def close(self) -> None:
        """Flushes, publishes and removes the temporary directory."""
        self.publish()
        if self._writer is not None:
            self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def location(store: ObjectStore, run: str) -> str:
    """The value of `tensorboard --logdir`."""
    return str(store.root / PREFIX / run) if store.root else f"{store.uri.rstrip('/')}/{PREFIX}/{run}"
