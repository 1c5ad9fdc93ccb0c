"""What a run has logged, as its checkpoints keep it."""

from collections.abc import Iterable
from typing import Any

from maas_ray.train.loop.progress import Progress
from maas_ray.train.spec.metrics import finite


class TrainingLog:
    """The entries of a run, oldest first: `{step, loss, lr}`, with `auxiliary` if there are such losses, and
    `{step, validation, classes}`.

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
            entry = {"step": validated, "validation": finite(progress.metrics)}
            if progress.classes is not None:
                self._forget_classes()
                entry["classes"] = progress.classes
            self.entries.append(entry)

    def _forget_classes(self) -> None:
        """Keeps the metrics of classes of the newest validation alone: a checkpoint contains the whole history."""
        for place, entry in enumerate(self.entries):
            if "classes" in entry:  # replaced, because a save may be writing the entry
                self.entries[place] = {name: value for name, value in entry.items() if name != "classes"}
