"""TensorBoard: scalars, histograms and sample predictions of a run."""

import tempfile
import time
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from maas_ray.store.objects import ObjectStore
from maas_ray.train.callbacks.base import Callback, EndReason, RunContext
from maas_ray.train.loop.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "tensorboard"


class TensorBoard(Callback):
    """Writes event files. Every run has this callback; `tensorboard` in the spec selects histograms and predictions.

    A local store is written to directly, so that TensorBoard shows a run while it trains. For an object store the files
    are kept in a temporary directory and uploaded with each checkpoint.
    """

    def on_begin(self, context: RunContext) -> None:
        self._context = context
        store = context.store
        self._scratch = None if store.root else tempfile.TemporaryDirectory(prefix="maas-tensorboard-")
        self._directory = store.root / PREFIX / context.run if store.root else Path(self._scratch.name)  # type: ignore[union-attr]
        self._writer: Any = None

    def on_step(self, progress: Progress) -> None:
        self._write(
            progress.step,
            {
                "train/loss": progress.loss,
                "train/lr": progress.lr,
                "train/samples_per_s": progress.samples_per_s,
                "train/tokens_per_s": progress.tokens_per_s,
                "train/mfu": progress.mfu,
                "train/epoch": progress.epoch,
                **{f"train/auxiliary/{name}": value for name, value in progress.auxiliary.items()},
            },
        )
        spec = self._context.spec
        every = spec.tensorboard.histograms_every
        if every is not None and progress.step // spec.log_every % every == 0:
            for name, value, gradient in self._context.parameters():
                self._write_histogram(progress.step, f"weights/{name}", value)
                if gradient is not None:
                    self._write_histogram(progress.step, f"gradients/{name}", gradient)

    def on_validation(self, progress: Progress) -> None:
        step = progress.step if progress.of_step is None else progress.of_step
        self._write(step, {f"validation/{name}": value for name, value in progress.metrics.items()})
        if progress.samples:
            self._writer.add_text("validation/samples", progress.samples, step)

    def on_checkpoint(self, step: int, prefix: str) -> None:
        self._publish()

    def on_end(self, reason: EndReason) -> None:
        self._publish()
        if self._writer is not None:
            self._writer.close()
        if self._scratch is not None:
            self._scratch.cleanup()

    def _write(self, step: int, scalars: dict[str, float | None]) -> None:
        if self._writer is None:
            from torch.utils.tensorboard.writer import SummaryWriter  # late: its 0.4 s need not delay the first step

            # What a lost attempt wrote after the first step is hidden.
            purged = self._context.first_step + 1
            self._writer = SummaryWriter(str(self._directory), purge_step=purged, flush_secs=5)
            if self._context.data and not self._context.first_step:
                self._writer.add_text("data", "\n".join(f"- {escape(line)}" for line in self._context.data), 0)
        now = time.time()
        for name, value in scalars.items():
            if value is not None:
                self._writer.add_scalar(name, value, step, walltime=now)

    def _write_histogram(self, step: int, name: str, value: "Tensor") -> None:
        values = value.detach().float().flatten()
        values = values[values.isfinite()]
        if values.numel():
            self._writer.add_histogram(name, values.cpu().numpy(), step)

    def _publish(self) -> None:
        """Makes what was written so far visible in an object store; in a local store it is already."""
        if self._writer is None:
            return
        self._writer.flush()
        if self._scratch is not None:
            for path in sorted(self._directory.iterdir()):
                self._context.store.put(f"{PREFIX}/{self._context.run}/{path.name}", path.read_bytes())


def location(store: ObjectStore, run: str) -> str:
    """The argument of `tensorboard --logdir`."""
    return str(store.root / PREFIX / run) if store.root else f"{store.uri.rstrip('/')}/{PREFIX}/{run}"
