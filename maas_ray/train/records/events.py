"""What the record of a run and its log may say, validated once. Knows no store."""

from typing import Any, Literal

from maas_ray.store.sealed import Count, Document, Time, read_document
from maas_ray.store.sequence import Record


class RunMeta(Document):
    """The manifest of a run: written once."""

    spec: dict[str, Any]
    """A `TrainSpec`."""
    data_digest: str
    created_s: Time
    git_commit: str | None = None
    start: dict[str, Any] | None = None


class RunStatus(Document):
    """Where a run stands since this record."""

    type: Literal["started", "finished", "failed", "stopped"]
    step: Count | None = None
    error: str | None = None
    reason: str | None = None
    metrics: dict[str, float] | None = None
    """Of a run that is finished: the newest loss and validation metrics."""


class Attempted(Document):
    """One time that the workers were started and have ended; see `train/ranks/rank_registry.py`."""

    type: Literal["attempt"]
    number: Count
    workers: Count
    first_step: Count | None = None
    reached: Count | None = None
    committed: Count
    reason: str


class Evaluated(Document):
    """Metrics of held-out data."""

    type: Literal["evaluated"]
    metrics: dict[str, float]


class Validated(Document):
    """Metrics that validation beside training has found."""

    type: Literal["validated"]
    step: Count
    metrics: dict[str, float]


class Unvalidated(Document):
    """Why validation beside training has no metrics of a step."""

    type: Literal["unvalidated"]
    step: Count
    error: str


Event = RunStatus | Attempted | Evaluated | Validated | Unvalidated
_KINDS: dict[str, type[Event]] = {
    **dict.fromkeys(("started", "finished", "failed", "stopped"), RunStatus),
    "attempt": Attempted,
    "evaluated": Evaluated,
    "validated": Validated,
    "unvalidated": Unvalidated,
}


class _Typed(Document):
    type: str


def read_event(record: Record) -> Event | None:
    """What a record of a run's log says; None: an event of a later version of this library.

    Raises:
        ObjectCorrupt: a field is missing or of another type; names the record.
    """
    what = f"the log record {record.key}"
    kind = _KINDS.get(read_document(_Typed, record.event, what).type)
    return None if kind is None else read_document(kind, record.event, what)
