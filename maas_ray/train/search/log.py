"""The log of a search in a store: its spec and the result of each trial. Independent of Ray and of the execution.

searches/<name>/manifest.json    the space and the base: written once, never changed
searches/<name>/log/…            one record for each ended trial
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
"""Fields that a resumed search cannot change; number of trials, concurrency and time limit can change."""


@dataclass(frozen=True)
class MetricValue:
    """A value of the search's metric during the training of a trial."""

    step: int
    done: float
    """Completed part of the trial, in (0, 1]."""
    value: float


@dataclass(frozen=True)
class TrialEnded:
    """The end of a trial."""

    status: Literal["finished", "stopped", "failed"]
    """`stopped`: by the scheduler."""
    metrics: tuple[MetricValue, ...] = ()
    error: str | None = None
    """Code and message of the error of a failed trial."""


class SearchLog:
    """One search of a store.

    Args:
        store: the store.
        name: name of the search.
    """

    def __init__(self, store: ObjectStore, name: str) -> None:
        self._store = store
        self._prefix = f"{PREFIX}/{name}"
        self._name = name
        self._log = Log(store, self._prefix)

    @property
    def prefix(self) -> str:
        """Prefix of the search in the store."""
        return self._prefix

    def refuse_existing(self) -> None:
        """Raises `Conflict` if the search exists."""
        with suppress(NotFound):
            open_committed(self._store, self._prefix, KIND)
            raise self._exists()

    def begin(self, spec: TuneSpec) -> None:
        """Commits a new search. Raises `Conflict` if the search exists."""
        self.refuse_existing()
        try:
            CommitWriter(self._store, self._prefix, KIND).commit(
                {**_fixed(spec), "scheduler": spec.scheduler.model_dump()}
            )
        except Conflict as error:  # another writer was faster
            raise self._exists() from error

    def resume(self, spec: TuneSpec) -> None:
        """Checks that the search exists and has the same fixed fields.

        Raises:
            NotFound: the search does not exist.
            SpecError: fixed fields differ; the message lists them.
        """
        try:
            meta = open_committed(self._store, self._prefix, KIND).meta
        except NotFound as error:
            raise NotFound(f"no search {self._name!r} in {self._store.uri}; start it without --resume") from error
        if changed := [name for name, value in _fixed(spec).items() if name not in meta or meta[name] != value]:
            raise SpecError(
                f"search {self._name!r} was started with other values of {', '.join(changed)}, so that its trials "
                "would differ; restore these values, or choose another name"
            )

    def _exists(self) -> Conflict:
        return Conflict(
            f"search {self._name!r} already exists in {self._store.uri}; continue it with --resume, or choose another "
            "name"
        )

    def record(self, number: int, ended: TrialEnded) -> None:
        """Appends the end of a trial."""
        event = {
            "type": "ended",
            "trial": number,
            "status": ended.status,
            "figures": [asdict(value) for value in ended.metrics],  # the name in the stored format
            "error": ended.error,
        }
        self._log.append(lambda _: event)

    def ended(self) -> dict[int, TrialEnded]:
        """The newest end of each ended trial."""
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
    """Reads the event of a record. Raises `ObjectCorrupt`."""
    return read_document(_EndedEvent, record.event, f"the log record {record.key}")


def order(metrics: Mapping[int, Sequence[MetricValue]]) -> list[tuple[int, MetricValue]]:
    """The metrics of all trials in the order in which a scheduler would receive them if the trials ran in parallel."""
    pairs = [(number, metric) for number, found in metrics.items() for metric in found]
    return sorted(pairs, key=lambda pair: (pair[1].done, pair[0]))


def _fixed(spec: TuneSpec) -> dict[str, Any]:
    fields = masked(spec.model_dump(mode="json"))
    fields["base"].pop("storage", None)  # the store itself, whose location can have changed
    fields["base"].pop("workers", None)
    return {**{name: fields[name] for name in _FIXED}, "mode": spec.direction}
