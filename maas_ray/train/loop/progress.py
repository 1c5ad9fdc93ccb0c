"""The progress report of a running training. Imports nothing heavy: the process that forwards it needs no torch."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Progress:
    """The progress report of a running training.

    Attributes:
        step: number of completed optimizer steps.
        epoch: completed passes over the training split, as a fraction.
        loss: mean loss per sample of this step over all ranks, including regularization.
        tokens_per_s: tokens per second over all ranks, if rows are sequences of tokens.
        mfu: model FLOPs utilization, if the peak of the devices is known.
        metrics: validation metrics, at the end of an epoch, if the data has a validation split.
        of_step: step of the metrics, if it is an earlier one (asynchronous validation).
        samples: predictions of that step for a few rows, as Markdown.
        auxiliary: mean of each auxiliary loss over the batch of this step, unweighted.
        workers: current number of workers; 0: unknown.
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
    auxiliary: dict[str, float] = field(default_factory=dict)
    workers: int = 0
