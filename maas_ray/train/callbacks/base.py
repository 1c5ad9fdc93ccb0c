"""The seam for a user's code in training. Knows no loop and no store's format."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from maas_ray.train.loop.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from maas_ray.store.objects import ObjectStore
    from maas_ray.train.spec.train import TrainSpec

EndReason = Literal["finished", "interrupted", "failed"]


@dataclass(frozen=True)
class RunContext:
    """What a callback may know of the run that it follows."""

    spec: "TrainSpec"
    store: "ObjectStore"
    first_step: int
    """Optimizer steps done before this attempt: 0, or the step of the checkpoint from which it continues."""
    history: Sequence[dict[str, Any]] = ()
    """What was logged before `first_step`: `{step, loss, lr}` and `{step, validation}`, oldest first."""
    parameters: "Callable[[], Iterator[tuple[str, Tensor, Tensor | None]]]" = field(default=lambda: iter(()))
    """Rank 0's pieces of the trained tensors: name, value and gradient of the step just done. To be read, not changed."""
    data: Sequence[str] = ()
    """The report of the data as lines: rows read and dropped, how columns were cast, classes."""

    @property
    def run(self) -> str:
        """Id of the run."""
        return self.spec.run

    @property
    def directory(self) -> Path | None:
        """Root of a local store; None for an object store."""
        return self.store.root


class Callback:
    """Follows a run; override what you need. Name it in a spec: `callbacks: [{path: package.module:Class}]`.

    Methods are called on rank 0 alone, in the process that trains and between two steps, so their time is training time.
    A new callback is created for each attempt, with the `params` of the spec. An exception ends the run: the message
    names the callback, and the run is not started again.
    """

    def on_begin(self, context: RunContext) -> None:
        """Before the first step of an attempt."""

    def on_step(self, progress: Progress) -> None:
        """After each logged step (`log_every`): loss, learning rate, speed."""

    def on_validation(self, progress: Progress) -> None:
        """When validation metrics are known: `metrics`, of step `of_step` or, if that is None, `step`."""

    def on_checkpoint(self, step: int, prefix: str) -> None:
        """After a checkpoint was committed. It is called in the thread that saves, while the next steps run.

        Args:
            step: optimizer steps done.
            prefix: where it is in the store.
        """

    def on_end(self, reason: EndReason) -> None:
        """Once at the end of an attempt, whatever ended it, unless the process was killed.

        Args:
            reason: `finished`; `interrupted` (the state is committed and the run continues later); or `failed`.
        """
