"""What a run has logged, as its checkpoints keep it."""

from collections.abc import Iterable
from typing import Any

from maas_ray.train.loop.progress import Progress
from maas_ray.train.spec.metrics import finite


class TrainingLog:
    """The entries of a run, oldest first: `{step, loss, lr}`, with `auxiliary` if there are such losses, and `{step, validation}`.

    Args:
        entries: those of the checkpoint from which the run continues.
    """

    def __init__(self, entries: Iterable[dict[str, Any]] = ()) -> None:
        self.entries = list(entries)

    def add(self, progress: Progress) -> None:
        """Adds what one report holds."""
        if progress.loss is not None:
            entry: dict[str, Any] = {"step": progress.step, "loss": progress.loss, "lr": progress.lr}
            if progress.auxiliary:
                entry["auxiliary"] = finite(progress.auxiliary)
            self.entries.append(entry)
        if progress.metrics:
            validated = progress.step if progress.of_step is None else progress.of_step
            self.entries.append({"step": validated, "validation": finite(progress.metrics)})
