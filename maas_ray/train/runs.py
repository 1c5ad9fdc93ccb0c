"""Runs: what was started, with which spec and data, and how it went. Knows nothing of how training works.

runs/<run>/manifest.json          the spec, the data digest and the code: written once, never changed
runs/<run>/log/…                  what happened since, see `Runs.record`
runs/<run>/checkpoints/<step>/    see checkpoint/catalog.py
runs/<run>/report/                see report.py
"""

import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from maas_ray.errors import Conflict, NotFound, ObjectCorrupt
from maas_ray.store.manifest import Draft, list_committed, open_committed
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sequence import Sequence
from maas_ray.train.spec import TrainSpec

PREFIX = "runs"
KIND = "run"


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
    """Optimizer steps done when it finished."""
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
            "spec": spec.model_dump(mode="json"),
            "data_digest": data_digest,
            "git_commit": git_commit,
            "created_s": self._clock(),
            "start": dict(start) if start is not None else None,
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
            meta = open_committed(self._store, run_prefix(run), KIND).meta
        except NotFound as error:
            names = ", ".join(self._ids()) or "none"
            raise NotFound(f"no run {run!r} in {self._store.uri}; there is: {names}") from error
        try:
            spec = TrainSpec.model_validate(meta["spec"])
        except ValidationError as error:
            raise ObjectCorrupt(f"run {run} was written by an incompatible version: {error}") from error
        status: dict[str, Any] = {"status": "started"}
        attempts: list[Mapping[str, Any]] = []
        unvalidated: dict[int, str] = {}
        for record in Sequence(self._store, run_prefix(run)).read():
            event = dict(record.event)
            kind = event.pop("type")
            if kind == "evaluated":
                status["metrics"] = event["metrics"]
            elif kind == "attempt":
                attempts.append(event)
            elif kind == "unvalidated":
                unvalidated[event["step"]] = event["error"]
            elif kind == "validated":
                unvalidated.pop(event["step"], None)  # a later attempt had more luck
            else:
                status.update({name: event.get(name) for name in ("step", "error", "reason")}, status=kind)
        return Run(
            run,
            spec,
            meta["data_digest"],
            meta["git_commit"],
            meta["created_s"],
            attempts=tuple(attempts),
            unvalidated=unvalidated,
            **status,
            start=meta.get("start"),
        )

    def validated(self, run: str) -> dict[int, dict[str, float]]:
        """What validation beside training has found, by step: `validation_loss` and so on."""
        events = (record.event for record in Sequence(self._store, run_prefix(run)).read())
        return {event["step"]: dict(event["metrics"]) for event in events if event["type"] == "validated"}

    def all(self) -> list[Run]:
        """All runs, newest first."""
        return sorted((self.get(run) for run in self._ids()), key=lambda run: -run.created_s)

    def record(self, run: str, event: Mapping[str, Any]) -> None:
        """Appends an event to a log.

        `{type: started | attempt | finished | failed | stopped | evaluated | validated | unvalidated, …}`
        """
        Sequence(self._store, run_prefix(run), self._clock).append(lambda _: event)

    def _ids(self) -> list[str]:
        return list_committed(self._store, PREFIX)


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
