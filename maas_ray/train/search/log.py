"""Searches in a store: what was begun, and how each trial has ended. Knows neither Ray nor how a trial is run.

searches/<name>/manifest.json    the space and the base: written once, never changed
searches/<name>/log/…            one record for each trial that has ended
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from maas_ray.display import masked
from maas_ray.errors import Conflict, NotFound, SpecError
from maas_ray.store.manifest import CommitWriter, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, read_document
from maas_ray.store.sequence import Record
from maas_ray.store.sequence import Sequence as Log
from maas_ray.train.search.spec import TuneSpec

PREFIX = "searches"
KIND = "search"
_FIXED = ("base", "search", "seed", "metric", "mode")
"""What has to stay the same for a search to go on; how many trials, how many at a time and until when may change."""


@dataclass(frozen=True)
class MetricValue:
    """The metric that counts, as a trial had it during its training."""

    step: int
    done: float
    """Part of the trial's own length, in (0, 1]."""
    value: float


@dataclass(frozen=True)
class TrialEnded:
    """How a trial has ended."""

    status: Literal["finished", "stopped", "failed"]
    """`stopped`: the scheduler has given it up."""
    metrics: tuple[MetricValue, ...] = ()
    error: str | None = None
    """Why it failed: code and message."""


class SearchLog:
    """One search of a store.

    Args:
        store: where it lies.
        name: of the search.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._prefix = f"{PREFIX}/{name}"
        self._name = name
        self._log = Log(store, self._prefix)

    @property
    def prefix(self) -> str:
        """Where the search is in the store."""
        return self._prefix

    def refuse_existing(self) -> None:
        """Raises `Conflict`: the name is taken."""
        with suppress(NotFound):
            open_committed(self._store, self._prefix, KIND)
            raise self._exists()

    def begin(self, spec: TuneSpec) -> None:
        """Commits a new search. Raises `Conflict`: the name is taken."""
        self.refuse_existing()
        try:
            CommitWriter(self._store, self._prefix, KIND).commit(
                {**_fixed(spec), "scheduler": spec.scheduler.model_dump()}
            )
        except Conflict as error:  # somebody was faster
            raise self._exists() from error

    def resume(self, spec: TuneSpec) -> None:
        """Checks that a search is there and is the same.

        Raises:
            NotFound: there is none.
            SpecError: it would be another search, with the fields that differ.
        """
        try:
            meta = open_committed(self._store, self._prefix, KIND).meta
        except NotFound as error:
            raise NotFound(f"no search {self._name!r} in {self._store.uri}; leave out --resume to begin it") from error
        if changed := [name for name, value in _fixed(spec).items() if name not in meta or meta[name] != value]:
            raise SpecError(
                f"search {self._name!r} was begun with another {', '.join(changed)}; its trials would be others: take the "
                "change back, or choose another name"
            )

    def _exists(self) -> Conflict:
        return Conflict(
            f"a search {self._name!r} exists in {self._store.uri}; give --resume to go on with it, or choose another name"
        )

    def record(self, number: int, ended: TrialEnded) -> None:
        """Appends how a trial has ended."""
        event = {
            "type": "ended",
            "trial": number,
            "status": ended.status,
            "figures": [asdict(value) for value in ended.metrics],  # the name that records had from the beginning
            "error": ended.error,
        }
        self._log.append(lambda _: event)

    def ended(self) -> dict[int, TrialEnded]:
        """The newest end of each trial that has one."""
        found = {}
        for record in self._log.read():
            event = read_event(record)
            metrics = tuple(MetricValue(value.step, value.done, value.value) for value in event.figures)
            found[event.trial] = TrialEnded(event.status, metrics, event.error)
        return found


class _MetricEntry(Document):
    step: Count
    done: float
    value: float


class _EndedEvent(Document):
    trial: Count
    status: Literal["finished", "stopped", "failed"]
    figures: list[_MetricEntry] = Field(default_factory=list)
    error: str | None = None


def read_event(record: Record) -> _EndedEvent:
    """What a record of a search says. Raises `ObjectCorrupt`."""
    return read_document(_EndedEvent, record.event, f"the log record {record.key}")


def order(metrics: Mapping[int, Sequence[MetricValue]]) -> list[tuple[int, MetricValue]]:
    """The metrics of all trials as a scheduler would have met them if they had trained side by side."""
    pairs = [(number, metric) for number, found in metrics.items() for metric in found]
    return sorted(pairs, key=lambda pair: (pair[1].done, pair[0]))


def _fixed(spec: TuneSpec) -> dict[str, Any]:
    fields = masked(spec.model_dump(mode="json"))
    fields["base"].pop("storage", None)  # the store that is looked into; its place may have another name by now
    fields["base"].pop("workers", None)
    return {**{name: fields[name] for name in _FIXED}, "mode": spec.direction}
