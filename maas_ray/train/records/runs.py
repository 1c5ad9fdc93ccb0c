"""The runs of a store: spec, data, code, status and events. Independent of the training itself.

runs/<run>/manifest.json          the spec, the data digest and the code: written once, never changed
runs/<run>/log/…                  the events, see `Runs.record`
runs/<run>/checkpoints/<step>/    see checkpoint/catalog.py
runs/<run>/report/                see report.py
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from maas_ray.checkpoint.catalog import newest_checkpoint
from maas_ray.display import get_logger, masked
from maas_ray.errors import Conflict, MaasError, NotFound, ObjectCorrupt
from maas_ray.store.fetch import attempt, in_parallel
from maas_ray.store.log.record import record_key
from maas_ray.store.manifest import NAME, Committed, CommitWriter, is_committed, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import malformed, read_document
from maas_ray.store.sequence import RECORD, Record, Sequence
from maas_ray.suggestions import known_names
from maas_ray.train.records.events import Evaluated, RunStatus, Validated, read_event
from maas_ray.train.records.events import RunMeta as _Meta
from maas_ray.train.records.history import fold
from maas_ray.train.records.run_index import MAX_UNVALIDATED, RunIndex, Summary, point_at_none
from maas_ray.train.spec.length import ExtensionSpec
from maas_ray.train.spec.train import TrainSpec

PREFIX = "runs"
KIND = "run"
FITTED = "fitted"
"""Name of the committed result of a classical run."""
MAX_NAMES = 50
"""Largest number of names in a message."""
MAX_LOOKED_UP = 4
"""Largest number of runs that have not ended whose index entry a list verifies: the newest."""

log = get_logger(__name__)


@dataclass(frozen=True)
class RunRecord:
    """The current state of a training run."""

    id: str
    spec: TrainSpec
    data_digest: str
    git_commit: str | None
    created_s: float
    """Seconds since 1970."""
    status: str
    """`started` (running, or killed), `finished`, `failed`, or `stopped` (asked to end; resume it)."""
    step: int | None = None
    """Optimizer step of the newest committed state, or None."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the newest evaluation on held-out data."""
    error: str | None = None
    reason: str | None = None
    """Reason for the end before the last step, or None."""
    start: Mapping[str, Any] | None = None
    """The initial weights; None: random weights from the seed."""
    attempts: tuple[Mapping[str, Any], ...] = ()
    """The attempts that have ended: `workers`, `first_step`, `reached`, `committed`, `reason` of each."""
    unvalidated: Mapping[int, str] = field(default_factory=dict)
    """Reasons for missing metrics of asynchronous validations, by step."""
    lengths: tuple[tuple[int | None, int | None], ...] = ()
    """Epochs and steps in the spec at the start and after each extension; `spec` has the last ones."""


class Runs:
    """The runs of one store.

    Args:
        store: the store.
        clock: returns seconds since 1970; set by tests.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self._index = RunIndex(store)

    def create(
        self, spec: TrainSpec, data_digest: str, git_commit: str | None, start: Mapping[str, Any] | None = None
    ) -> RunRecord:
        """Commits a new run.

        Args:
            spec: spec of the run.
            data_digest: digest of the prepared data set.
            git_commit: commit of the code.
            start: the initial weights, see `train/state/warm_start.py`; None: random weights from the seed.

        Raises:
            Conflict: the run already exists.
        """
        meta = {
            "spec": masked(spec.model_dump(mode="json")),
            "data_digest": data_digest,
            "git_commit": git_commit,
            "created_s": self._clock(),
            "start": masked(dict(start)) if start is not None else None,
        }
        writer = CommitWriter(self._store, run_prefix(spec.run), KIND)
        try:
            writer.commit(meta)
        except Conflict as error:
            raise Conflict(
                f"run {spec.run!r} already exists in {self._store.uri}; continue it with --resume, or choose another "
                "run name"
            ) from error
        run, records, found = self._get(spec.run)
        self._index.write([self._summarized(spec.run, found, records)])
        return run

    def get(self, run: str) -> RunRecord:
        """Returns one run. Raises `NotFound` with the names of existing runs."""
        try:
            return self._get(run)[0]
        except NotFound as error:
            there = known_names(run, self._names(), "runs", "maas-ray runs")
            raise NotFound(f"no run {run!r} in {self._store.uri}; {there}") from error

    def validated(self, run: str) -> dict[int, dict[str, float]]:
        """Metrics of asynchronous validations by step: `validation_loss` and so on."""
        events = map(read_event, Sequence(self._store, run_prefix(run)).read())
        return {event.step: dict(event.metrics) for event in events if isinstance(event, Validated)}

    def validated_classes(self, run: str) -> dict[int, dict[str, Any]]:
        """Metrics of each class of asynchronous validations by step; see `class_report` in evaluation/class_metrics.py."""
        events = map(read_event, Sequence(self._store, run_prefix(run)).read())
        return {event.step: event.classes for event in events if isinstance(event, Validated) and event.classes}

    def evaluated(self, run: str) -> dict[str, dict[str, float]]:
        """Metrics of the newest evaluation of each split."""
        events = map(read_event, Sequence(self._store, run_prefix(run)).read())
        return {event.split: dict(event.metrics) for event in events if isinstance(event, Evaluated) and event.split}

    def all(self) -> list[Summary]:
        """All runs, newest first, without damaged ones; see `survey`."""
        return self.survey()[0]

    def survey(self) -> tuple[list[Summary], dict[str, MaasError]]:
        """All runs, newest first, and the errors of unreadable ones by name.

        Reads the index (see run_index.py) with a dozen requests, plus one listing for each thousand runs. Runs that
        are not in the index are read individually and added. The entries of the newest runs that have not ended are
        verified: their process may have died between two writes, or be of a version without an index.
        """
        names, index, steps = self._listed()
        there = set(names)
        known = {run: summary for run, summary in (index or {}).items() if run in there}
        for run, step in steps.items():
            if run in known and known[run].status == "started" and step > (known[run].step or 0):
                known[run] = known[run].model_copy(update={"step": step})
        open_ones = sorted((run for run in known.values() if run.status == "started"), key=lambda run: -run.created_s)
        newest = open_ones[:MAX_LOOKED_UP]
        stale = [
            run.id
            for run, is_current in zip(newest, in_parallel(self._is_current, newest), strict=True)
            if not is_current
        ]
        todo = [*(run for run in names if run not in known), *stale]
        damaged: dict[str, MaasError] = {}
        found: list[Summary] = []
        for run, summary in zip(todo, in_parallel(attempt(self._summary), todo), strict=True):
            if isinstance(summary, Summary):
                found.append(summary)
            elif not isinstance(summary, NotFound):  # a folder without a manifest is no run
                damaged[run] = summary
        if index is not None:
            self._index.write(found)
        known |= {summary.id: summary for summary in found}
        whole = [summary for run, summary in known.items() if run not in damaged]
        return sorted(whole, key=lambda run: -run.created_s), damaged

    def reindex(self) -> int:
        """Compares the index with every run and adds the differences; returns their number.

        A damaged index is removed and rebuilt.
        """
        names, known, _ = self._listed()
        if known is None:
            self._index.clear()
            known = {}
        found = [each for each in in_parallel(attempt(self._summary), names) if isinstance(each, Summary)]
        differ = [each for each in found if known.get(each.id) != each]
        self._index.write(differ)
        return len(differ)

    def record(self, run: str, event: Mapping[str, Any]) -> None:
        """Appends an event to the log of a run.

        `{type: started | extended | attempt | finished | failed | stopped | evaluated | validated | unvalidated, …}`
        """
        before: list[Record] = []

        def make_event(records: list[Record]) -> Mapping[str, Any]:
            before[:] = records
            return event

        record = Sequence(self._store, run_prefix(run), self._clock).append(make_event)
        try:
            self._note(run, before, record)
        except MaasError as error:  # the event is stored; a list of runs will detect it
            log.warning("the index of runs was not updated for run %r: %s", run, error)

    def _note(self, run: str, before: list[Record], record: Record) -> None:
        """Updates the index if the listed fields of a run have changed."""
        old, new = fold(before), fold([*before, record])
        if (old.status, old.metrics, old.unvalidated) == (new.status, new.metrics, new.unvalidated):
            return
        committed = open_committed(self._store, run_prefix(run), KIND)
        self._index.write([self._summarized(run, _read(committed)[1], [*before, record])])
        if new.status.type != "started":
            point_at_none(self._store, checkpoints_prefix(run))

    def _get(self, run: str) -> tuple[RunRecord, list[Record], _Meta]:
        spec, meta = _read(open_committed(self._store, run_prefix(run), KIND))
        records = list(Sequence(self._store, run_prefix(run)).read())
        history = fold(records)
        lengths = [(spec.epochs, spec.steps)]
        for each in history.extensions:
            spec = spec.extended(ExtensionSpec.model_validate(each.model_dump(exclude={"type"})))
            lengths.append((spec.epochs, spec.steps))
        found = RunRecord(
            run,
            spec,
            meta.data_digest,
            meta.git_commit,
            meta.created_s,
            history.status.type,
            step=self._step(run, history.status),
            metrics=history.metrics,
            error=history.status.error,
            reason=history.status.reason,
            start=meta.start,
            attempts=tuple(history.attempts),
            unvalidated=history.unvalidated,
            lengths=tuple(lengths),
        )
        return found, records, meta

    def _summary(self, run: str) -> Summary:
        _, meta = _read(open_committed(self._store, run_prefix(run), KIND))
        return self._summarized(run, meta, list(Sequence(self._store, run_prefix(run)).read()))

    def _summarized(self, run: str, meta: _Meta, records: list[Record]) -> Summary:
        history = fold(records)
        return Summary(
            id=run,
            created_s=meta.created_s,
            data_digest=meta.data_digest,
            git_commit=meta.git_commit,
            status=history.status.type,
            step=self._step(run, history.status),
            metrics=dict(history.metrics),
            error=history.status.error,
            reason=history.status.reason,
            missing={str(step): why for step, why in sorted(history.unvalidated.items())[-MAX_UNVALIDATED:]},
            records=len(records),
        )

    def _listed(self) -> tuple[list[str], dict[str, Summary] | None, dict[str, int]]:
        """The names of runs in the store, the index, and the pointers, all read in parallel.

        The index is None if it is damaged, which `fsck` reports: the runs are authoritative.
        """
        names: list[str] = []
        known: dict[str, Summary] | None = {}
        steps: dict[str, int] = {}

        def read_index() -> None:
            nonlocal known
            try:
                known = self._index.read()
            except ObjectCorrupt as error:
                log.warning(
                    "the index of runs is damaged, so that each run is read: %s; rebuild it with `maas-ray compact`",
                    error,
                )
                known = None

        def list_names() -> None:
            names.extend(self._names())

        def list_steps() -> None:
            steps.update(self._index.steps())

        in_parallel(lambda part: part(), (list_names, read_index, list_steps))
        return names, known, steps

    def _is_current(self, run: Summary) -> bool:
        """Whether the index entry of a run is current; takes two or three listings."""
        place = f"{run_prefix(run.id)}/log"
        # The first record of a log is the start of the run, which every summary includes.
        newer = self._store.scan(place, after=record_key(place, max(run.records, 1)))
        if any(RECORD.fullmatch(info.key) for info in newer):
            return False
        return (run.step or 0) >= (newest_checkpoint(self._store, checkpoints_prefix(run.id)) or 0)

    def _step(self, run: str, status: RunStatus) -> int | None:
        if status.type == "finished":
            return status.step
        if (step := newest_checkpoint(self._store, checkpoints_prefix(run))) is not None:
            return step
        return 1 if is_committed(self._store, f"{run_prefix(run)}/{FITTED}") else None

    def _names(self) -> list[str]:
        return self._store.children(PREFIX)


def check_run(committed: Committed) -> Iterator[MaasError]:
    """Yields the errors in the record of a run, for `fsck`."""
    try:
        _read(committed)
    except MaasError as error:
        yield error


def _read(committed: Committed) -> tuple[TrainSpec, _Meta]:
    what = f"{committed.prefix}/{NAME}"
    meta = read_document(_Meta, committed.meta, what)
    try:
        return TrainSpec.model_validate(meta.spec), meta
    except ValidationError as error:
        raise malformed(f"the spec in {what}", error) from None


def run_prefix(run: str) -> str:
    """Prefix of a run in the store."""
    return f"{PREFIX}/{run}"


def checkpoints_prefix(run: str) -> str:
    """Prefix of a run's checkpoints in the store."""
    return f"{run_prefix(run)}/checkpoints"
