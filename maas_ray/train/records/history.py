"""What the log of a run says, as of its newest record. Knows no store."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from maas_ray.store.sequence import Record
from maas_ray.train.records.events import Attempted, Evaluated, RunStatus, Unvalidated, Validated, read_event


@dataclass
class History:
    """What the log of a run says."""

    status: RunStatus
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest evaluation on held-out data."""
    attempts: list[Mapping[str, Any]] = field(default_factory=list)
    """Each time that the workers were started and have ended."""
    unvalidated: dict[int, str] = field(default_factory=dict)
    """By step: why validation beside training has no metrics of it."""


def fold(records: Iterable[Record]) -> History:
    """What a run's records say, taken together. Raises `ObjectCorrupt` for one that is malformed."""
    found = History(RunStatus(type="started"))
    for record in records:
        event = read_event(record)
        if isinstance(event, Evaluated):
            found.metrics = event.metrics
        elif isinstance(event, Attempted):
            found.attempts.append({name: value for name, value in record.event.items() if name != "type"})
        elif isinstance(event, Unvalidated):
            found.unvalidated[event.step] = event.error
        elif isinstance(event, Validated):
            found.unvalidated.pop(event.step, None)  # a later attempt had more luck
        elif event is not None:
            found.status = event
            found.metrics = event.metrics or found.metrics
    return found
