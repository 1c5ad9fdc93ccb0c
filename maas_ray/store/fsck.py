"""Checks every committed object of a store against its digest, and finds leftovers of interrupted writes."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from maas_ray.errors import MaasError
from maas_ray.store import manifest, probe, sealed
from maas_ray.store.log.check import check_log
from maas_ray.store.log.record import RECORD, Record
from maas_ray.store.log.snapshot import SNAPSHOT
from maas_ray.store.objects import ObjectInfo, ObjectStore

GRACE = timedelta(hours=24)
"""An orphan younger than this may belong to a commit in progress; it is never collected."""

LOGS = ("tensorboard", "ray", "")
"""Prefixes that other programs write to: TensorBoard's event files, Ray Train's state and the empty directory markers
of its S3 client. They are not part of any commit."""

CommitCheck = Callable[[manifest.Committed], Iterator[MaasError]]
"""Yields the errors in the content of a commit, as defined by the module that owns its kind."""
RecordCheck = Callable[[Record], object]
"""Raises a `MaasError` if the event of a record is not valid for the module that owns the log."""

_POINTERS = f"{manifest.POINTERS}/"
_PART = re.compile(r"/parts-[0-9a-f]{32}/")
_BEAT = re.compile(r"/owners/beat-[0-9a-f]{32}$")
"""Heartbeats of the owner of a lease; see `store/lease.py`."""


@dataclass(frozen=True)
class Checks:
    """Checks of the content of commits and logs, in addition to their digests; each owning module provides its own."""

    commits: dict[str, CommitCheck] = field(default_factory=dict)
    """By kind."""
    records: Sequence[tuple[re.Pattern[str], RecordCheck]] = ()
    """By a pattern for the whole prefix of the log."""


@dataclass
class Report:
    """The result of a check. A store is sound if `problems` is empty; orphans only take space."""

    num_objects: int = 0
    num_commits: int = 0
    num_records: int = 0
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    collected: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Objects that this library did not write; never modified."""


def fsck(
    store: ObjectStore,
    *,
    collect: bool = False,
    grace: timedelta = GRACE,
    now: datetime | None = None,
    checks: Checks | None = None,
) -> Report:
    """Verifies every manifest, part, log record and snapshot; reports each damaged one and continues.

    Args:
        store: the store to check.
        collect: also remove orphans older than `grace`: parts that no manifest names, interrupted local
            writes, probe objects. Objects that a manifest names and files of other programs are never removed.
        grace: the age below which an orphan may be a commit in progress.
        now: the time from which ages are computed.
        checks: checks of the content of commits and records.
    """
    checks = checks or Checks()
    report = Report()
    objects = {info.key: info for info in store.scan("")}
    report.num_objects = len(objects)
    named: set[str] = set()
    logs: set[str] = set()
    for key in objects:
        if key.rsplit("/", 1)[-1] == manifest.NAME:
            named.add(key)
            named.update(_check_commit(store, key, report, checks))
        elif match := RECORD.fullmatch(key) or SNAPSHOT.fullmatch(key):
            named.add(key)
            logs.add(match[1])
        elif key.startswith(_POINTERS) and f"{key.removeprefix(_POINTERS)}/{manifest.NAME}" in objects:
            named.add(key)
    for prefix in sorted(logs):
        _check_log(store, prefix, report, checks)
    loose = [info for key, info in objects.items() if key not in named]
    ours = [info for info in loose if _is_ours(info.key)]
    foreign = [*(info.key for info in loose if info not in ours), *store.odd()]
    report.foreign = sorted(key for key in foreign if key.split("/")[0] not in LOGS)
    # A heartbeat is not an orphan while its owner writes it.
    now = now or datetime.now(UTC)
    ours = [info for info in ours if not (_BEAT.search(info.key) and now - info.modified < grace)]
    staged = list(store.staged())
    deadline = now - grace
    for info in [*ours, *staged]:
        if collect and info.modified <= deadline:
            _remove(store, info, is_staged=info in staged)
            report.collected.append(info.key)
        else:
            report.orphans.append(info.key)
    return report


def _is_ours(key: str) -> bool:
    return bool(_PART.search(key) or _BEAT.search(key)) or key.startswith((f"{probe.PREFIX}/", _POINTERS))


def _check_commit(store: ObjectStore, key: str, report: Report, checks: Checks) -> set[str]:
    """Verifies one commit; returns the keys that its manifest names."""
    prefix = key.removesuffix(f"/{manifest.NAME}")
    try:
        committed = manifest.parse_manifest(store, prefix, None, sealed.unseal(key, store.get(key)))
    except MaasError as error:
        report.problems.append(str(error))
        # Its parts may still be valid: keep them for a repair of the manifest.
        return {info.key for info in store.scan(prefix)}
    report.num_commits += 1
    found = manifest.verify(committed)
    if not found and committed.kind in checks.commits:
        found = list(checks.commits[committed.kind](committed))
    report.problems.extend(str(problem) for problem in found)
    return {part.key for part in committed.parts.values()}


def _check_log(store: ObjectStore, prefix: str, report: Report, checks: Checks) -> None:
    check = next((check for pattern, check in checks.records if pattern.fullmatch(prefix)), None)
    for found in check_log(store, prefix):
        if isinstance(found, MaasError):
            report.problems.append(str(found))
            continue
        try:
            if check is not None:
                check(found)
            report.num_records += 1
        except MaasError as error:
            report.problems.append(str(error))


def _remove(store: ObjectStore, info: ObjectInfo, is_staged: bool) -> None:
    if is_staged:
        store.delete_staged(info)
    else:
        store.delete([info.key])
