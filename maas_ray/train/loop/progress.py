"""What a running training says of itself. Imports nothing heavy: the process that passes it on needs no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """What a running training says of itself.

    Attributes:
        step: optimizer steps done.
        epoch: passes over the training split done, as a fraction.
        loss: mean loss per sample of this step over all ranks, regularization included.
        tokens_per_s: over all ranks, where rows are sequences of tokens.
        mfu: share of the operations per second that the devices could do at best, where that is known.
        metrics: validation metrics, at the end of an epoch, where the data has a validation split.
        of_step: the step that these are of, if it is an earlier one (validation beside training).
        samples: predictions of that step for a few rows, as Markdown.
        workers: processes that train by now; 0: not said.
    """

    step: int
    total_steps: int
    epoch: float
    loss: float | None = None
    lr: float | None = None
    samples_per_s: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    of_step: int | None = None
    samples: str = ""
    workers: int = 0
