"""The index of runs: summaries of all runs in one log, so that a dozen requests list thousands of runs.

index/runs/log/…                                  {type: runs, runs: [summary, …]}; the summary with most records counts
index/newest/runs/<run>/checkpoints/<step>        an empty object: the newest committed step of a run that has not ended

Both are derived from the runs, which are authoritative: missing entries are read from the runs and then added.
"""

from collections.abc import Iterable
from contextlib import suppress
from typing import Annotated, Literal

from pydantic import Field

from maas_ray.display import get_logger
from maas_ray.errors import Conflict, MaasError
from maas_ray.store.manifest import POINTERS
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, Time, read_document
from maas_ray.store.sequence import Record, Sequence

PREFIX = "index/runs"
MAX_TOGETHER = 100
"""Largest number of runs in one record."""
MAX_UNVALIDATED = 20
"""Largest number of steps without validation metrics in one summary: the newest."""

log = get_logger(__name__)


class Summary(Document):
    """The summary of a run in a list; `Runs.get` returns all of it."""

    id: str
    created_s: Time
    """Seconds since 1970."""
    data_digest: str
    git_commit: str | None = None
    status: Literal["started", "finished", "failed", "stopped"]
    """See `runs.RunRecord`."""
    step: Count | None = None
    """Optimizer step of the newest committed state, or None."""
    metrics: dict[str, float] = Field(default_factory=dict)
    """Metrics of the newest evaluation on held-out data."""
    error: str | None = None
    reason: str | None = None
    missing: dict[Annotated[str, Field(pattern=r"^[0-9]{1,18}$")], str] = Field(default_factory=dict)
    """The newest steps without metrics of asynchronous validation, each with the reason."""
    records: Count
    """Number of records of the run's log that the summary includes."""

    @property
    def unvalidated(self) -> dict[int, str]:
        """Reasons for missing metrics of asynchronous validations, by step; the newest `MAX_UNVALIDATED`."""
        return {int(step): why for step, why in self.missing.items()}


class _IndexEvent(Document):
    type: str
    runs: list[Summary]


def read_index_event(record: Record) -> _IndexEvent | None:
    """Reads the event of a record; None: an event of a later version of this library. Raises `ObjectCorrupt`."""
    if isinstance(kind := record.event.get("type"), str) and kind != "runs":
        return None
    return read_document(_IndexEvent, record.event, f"the log record {record.key}")


class RunIndex:
    """The index of one store.

    Args:
        store: the store of the runs.
    """

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self._log = Sequence(store, PREFIX)

    def read(self) -> dict[str, Summary]:
        """The newest summary of every run in the index.

        Raises:
            ObjectCorrupt: a record is damaged or malformed; the message contains it.
        """
        newest: dict[str, Summary] = {}
        for record in self._log.read():
            event = read_index_event(record)
            for summary in event.runs if event is not None else ():
                known = newest.get(summary.id)
                if known is None or summary.records >= known.records:
                    newest[summary.id] = summary
        return newest

    def steps(self) -> dict[str, int]:
        """The newest committed step of runs that have not ended."""
        found: dict[str, int] = {}
        for info in self._store.scan(f"{POINTERS}/runs"):
            *_, run, _, step = info.key.split("/")
            if step.isdecimal():
                found[run] = max(found.get(run, 0), int(step))
        return found

    def write(self, summaries: Iterable[Summary]) -> None:
        """Adds summaries. An error of the store is only logged: lists of runs then read these runs directly."""
        todo = [summary.model_dump(mode="json") for summary in summaries]
        try:
            for begin in range(0, len(todo), MAX_TOGETHER):
                self._log.note({"type": "runs", "runs": todo[begin : begin + MAX_TOGETHER]})
        except MaasError as error:
            log.warning("the index of runs was not updated: %s", error)

    def clear(self) -> None:
        """Removes the index, which can be derived from the runs."""
        self._store.delete([info.key for info in self._store.scan(self._log.place)])
        self._log = Sequence(self._store, PREFIX)


def point_at(store: ObjectStore, place: str) -> None:
    """Makes a committed checkpoint the newest one of its run in lists of runs. Errors of the store are ignored.

    Args:
        store: the store of the checkpoint.
        place: prefix of the checkpoint, `runs/<run>/checkpoints/<step>`.
    """
    key = f"{POINTERS}/{place}"
    with suppress(MaasError):
        with suppress(Conflict):
            store.create(key, b"")
        above = key.rpartition("/")[0]
        store.delete([info.key for info in store.scan(above) if info.key < key])


def point_at_none(store: ObjectStore, checkpoints: str) -> None:
    """Removes the pointers of a run that has ended, whose summary contains its step."""
    with suppress(MaasError):
        store.delete([info.key for info in store.scan(f"{POINTERS}/{checkpoints}")])
