"""The progress report of a running training. Imports nothing heavy: the process that forwards it needs no torch."""

from dataclasses import dataclass, field
from typing import Any


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
        classes: metrics of each class at that step, see `class_report` in evaluation/class_metrics.py; None: not a classifier.
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
    classes: dict[str, Any] | None = None
    workers: int = 0
