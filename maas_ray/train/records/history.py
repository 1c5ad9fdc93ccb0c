"""The state of a run according to its log. Independent of the store."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maas_ray.store.sequence import Record
from maas_ray.train.records.events import (
    Attempted,
    Evaluated,
    Extended,
    RunStatus,
    Unvalidated,
    Validated,
    read_event,
)


@dataclass
class History:
    """The state of a run according to its log."""

    status: RunStatus
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the newest evaluation on held-out data."""
    attempts: list[Mapping[str, Any]] = field(default_factory=list)
    """The attempts that have ended."""
    extensions: list[Extended] = field(default_factory=list)
    """The extensions of the run."""
    unvalidated: dict[int, str] = field(default_factory=dict)
    """Reasons for missing metrics of asynchronous validations, by step."""


def fold(records: Iterable[Record]) -> History:
    """Combines the records of a run. Raises `ObjectCorrupt` for a malformed record."""
    found = History(RunStatus(type="started"))
    for record in records:
        event = read_event(record)
        if isinstance(event, Evaluated):
            found.metrics = event.metrics
        elif isinstance(event, Extended):
            found.extensions.append(event)
            found.status = RunStatus(type="stopped")  # a finished run is unfinished again
        elif isinstance(event, Attempted):
            found.attempts.append({name: value for name, value in record.event.items() if name != "type"})
        elif isinstance(event, Unvalidated):
            found.unvalidated[event.step] = event.error
        elif isinstance(event, Validated):
            found.unvalidated.pop(event.step, None)  # a later attempt succeeded
        elif event is not None:
            found.status = event
            found.metrics = event.metrics or found.metrics
    return found
