"""The documents of a run's manifest and log, and their validation. Independent of the store."""

from typing import Any, Literal

from maas_ray.store.sealed import Count, Document, Time, read_document
from maas_ray.store.sequence import Record


class RunMeta(Document):
    """The manifest of a run, which is written once."""

    spec: dict[str, Any]
    """A `TrainSpec`."""
    data_digest: str
    created_s: Time
    git_commit: str | None = None
    start: dict[str, Any] | None = None


class RunStatus(Document):
    """The status of a run from this record on."""

    type: Literal["started", "finished", "failed", "stopped"]
    step: Count | None = None
    error: str | None = None
    reason: str | None = None
    metrics: dict[str, float] | None = None
    """The newest loss and validation metrics of a finished run."""


class Extended(Document):
    """A longer length of the run, from a committed step on."""

    type: Literal["extended"]
    step: Count
    position: Count
    epochs: Count | None = None
    steps: Count | None = None


class Attempted(Document):
    """One attempt, from the start of the workers to their end; see `train/ranks/rank_registry.py`."""

    type: Literal["attempt"]
    number: Count
    workers: Count
    first_step: Count | None = None
    reached: Count | None = None
    committed: Count
    reason: str


class Evaluated(Document):
    """Metrics of an evaluation on held-out data."""

    type: Literal["evaluated"]
    metrics: dict[str, float]
    split: str | None = None


class Validated(Document):
    """Metrics of an asynchronous validation."""

    type: Literal["validated"]
    step: Count
    metrics: dict[str, float]
    classes: dict[str, Any] | None = None
    """Metrics of each class, see `class_report` in evaluation/class_metrics.py."""


class Unvalidated(Document):
    """The reason why an asynchronous validation has no metrics."""

    type: Literal["unvalidated"]
    step: Count
    error: str


Event = RunStatus | Extended | Attempted | Evaluated | Validated | Unvalidated
_KINDS: dict[str, type[Event]] = {
    **dict.fromkeys(("started", "finished", "failed", "stopped"), RunStatus),
    "extended": Extended,
    "attempt": Attempted,
    "evaluated": Evaluated,
    "validated": Validated,
    "unvalidated": Unvalidated,
}


class _Typed(Document):
    type: str


def read_event(record: Record) -> Event | None:
    """Reads the event of a record in a run's log; None: an event of a later version of this library.

    Raises:
        ObjectCorrupt: a field is missing or has the wrong type; the message contains the record.
    """
    what = f"the log record {record.key}"
    kind = _KINDS.get(read_document(_Typed, record.event, what).type)
    return None if kind is None else read_document(kind, record.event, what)
