"""Runs: what was started, with which spec and data, and how it went. Knows nothing of how training works.

runs/<run>/manifest.json          the spec, the data digest and the code: written once, never changed
runs/<run>/log/…                  what happened since, see `Runs.record`
runs/<run>/checkpoints/<step>/    see checkpoint/catalog.py
runs/<run>/report/                see report.py
"""

import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.display import masked
from maas_ray.errors import Conflict, MaasError, NotFound
from maas_ray.store.manifest import NAME, Committed, Draft, list_committed, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import malformed, read_document
from maas_ray.store.sequence import Sequence
from maas_ray.train.run_events import Attempted, Evaluated, Status, Unvalidated, Validated, read_event
from maas_ray.train.run_events import RunMeta as _Meta
from maas_ray.train.spec import TrainSpec

PREFIX = "runs"
KIND = "run"
FITTED = "fitted"
"""Where the one result of a classical run is committed."""


@dataclass(frozen=True)
class Run:
    """One training run as of now."""

    id: str
    spec: TrainSpec
    data_digest: str
    git_commit: str | None
    created_s: float
    """Seconds since 1970."""
    status: str
    """`started` (running, or killed without a word), `finished`, `failed`, or `stopped` (asked to end; resume it)."""
    step: int | None = None
    """Optimizer steps of the newest state that is committed; None: there is none yet."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """The newest evaluation on held-out data."""
    error: str | None = None
    reason: str | None = None
    """Why it finished before its last step."""
    start: Mapping[str, Any] | None = None
    """The weights that it started from; None: those that its seed drew."""
    attempts: tuple[Mapping[str, Any], ...] = ()
    """Each time that its workers were started and have ended: `workers`, `first_step`, `reached`, `committed`, `reason`."""
    unvalidated: Mapping[int, str] = field(default_factory=dict)
    """By step: why validation beside training has no figures of it."""


class Runs:
    """The runs of one store.

    Args:
        store: where they lie.
        clock: seconds since 1970; passed in by tests.
    """

    def __init__(self, store: ObjectStore, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    def create(
        self, spec: TrainSpec, data_digest: str, git_commit: str | None, start: Mapping[str, Any] | None = None
    ) -> Run:
        """Commits a new run.

        Args:
            spec: what it is.
            data_digest: the prepared data set.
            git_commit: the code.
            start: the weights that it starts from, see `train/warm_start.py`; None: those that its seed draws.

        Raises:
            Conflict: the id is taken.
        """
        meta = {
            "spec": masked(spec.model_dump(mode="json")),
            "data_digest": data_digest,
            "git_commit": git_commit,
            "created_s": self._clock(),
            "start": masked(dict(start)) if start is not None else None,
        }
        draft = Draft(self._store, run_prefix(spec.run), KIND)
        try:
            draft.commit(meta)
        except Conflict as error:
            raise Conflict(
                f"a run {spec.run!r} exists in {self._store.uri}; give --resume to continue it, or choose another name"
            ) from error
        return self.get(spec.run)

    def get(self, run: str) -> Run:
        """One run. Raises `NotFound`, naming the runs that exist."""
        try:
            committed = open_committed(self._store, run_prefix(run), KIND)
        except NotFound as error:
            names = ", ".join(self._ids()) or "none"
            raise NotFound(f"no run {run!r} in {self._store.uri}; there is: {names}") from error
        spec, meta = _read(committed)
        status = Status(type="started")
        metrics: Mapping[str, float] = {}
        attempts: list[Mapping[str, Any]] = []
        unvalidated: dict[int, str] = {}
        for record in Sequence(self._store, run_prefix(run)).read():
            event = read_event(record)
            if isinstance(event, Evaluated):
                metrics = event.metrics
            elif isinstance(event, Attempted):
                attempts.append({name: value for name, value in record.event.items() if name != "type"})
            elif isinstance(event, Unvalidated):
                unvalidated[event.step] = event.error
            elif isinstance(event, Validated):
                unvalidated.pop(event.step, None)  # a later attempt had more luck
            elif event is not None:
                status = event
        return Run(
            run,
            spec,
            meta.data_digest,
            meta.git_commit,
            meta.created_s,
            status.type,
            step=status.step if status.type == "finished" else self._committed_step(run),
            metrics=metrics,
            error=status.error,
            reason=status.reason,
            start=meta.start,
            attempts=tuple(attempts),
            unvalidated=unvalidated,
        )

    def validated(self, run: str) -> dict[int, dict[str, float]]:
        """What validation beside training has found, by step: `validation_loss` and so on."""
        events = map(read_event, Sequence(self._store, run_prefix(run)).read())
        return {event.step: dict(event.metrics) for event in events if isinstance(event, Validated)}

    def all(self) -> list[Run]:
        """All runs, newest first; those that are damaged are left out, see `survey`."""
        return self.survey()[0]

    def survey(self) -> tuple[list[Run], dict[str, MaasError]]:
        """All runs, newest first, and by name what is wrong with those that cannot be read."""
        found: list[Run] = []
        damaged: dict[str, MaasError] = {}
        for run in self._ids():
            try:
                found.append(self.get(run))
            except MaasError as error:
                if error.retryable:
                    raise  # the store is away; that says nothing about the run
                damaged[run] = error
        return sorted(found, key=lambda run: -run.created_s), damaged

    def record(self, run: str, event: Mapping[str, Any]) -> None:
        """Appends an event to a log.

        `{type: started | attempt | finished | failed | stopped | evaluated | validated | unvalidated, …}`
        """
        Sequence(self._store, run_prefix(run), self._clock).append(lambda _: event)

    def _committed_step(self, run: str) -> int | None:
        if steps := list_checkpoints(self._store, checkpoints_prefix(run)):
            return steps[-1]
        return 1 if FITTED in list_committed(self._store, run_prefix(run)) else None

    def _ids(self) -> list[str]:
        return list_committed(self._store, PREFIX)


def check_run(committed: Committed) -> Iterator[MaasError]:
    """What is wrong with the record of a run; for `fsck`."""
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
    """Where a run lies in the store."""
    return f"{PREFIX}/{run}"


def checkpoints_prefix(run: str) -> str:
    """Where a run's checkpoints lie in the store."""
    return f"{run_prefix(run)}/checkpoints"


def git_commit(directory: Path) -> str | None:
    """The commit that `directory` is at, with `+changes` if files differ from it; None outside a git repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git on this machine: lineage then rests on the spec and data digests
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if git("status", "--porcelain") else commit
