"""Checks every committed object of a store against its digest, and finds what interrupted writes left behind."""

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from maas_ray.errors import MaasError
from maas_ray.store import manifest, probe
from maas_ray.store.objects import ObjectInfo, ObstoreStore
from maas_ray.store.sequence import Sequence

GRACE = timedelta(hours=24)
"""An orphan younger than this may belong to a commit in progress; it is never collected."""

LOGS = ("tensorboard", "ray", "")
"""Places that other programs write to as they go: TensorBoard's event files, Ray Train's notes and the empty
directory markers that its S3 client leaves. They are no part of any commit."""

_RECORD = re.compile(r"(.+)/log/\d{20}\.json$")
_PART = re.compile(r"/parts-[0-9a-f]{32}/")


@dataclass
class Report:
    """What was found. A store is sound if `problems` is empty; orphans only take space."""

    num_objects: int = 0
    num_commits: int = 0
    num_records: int = 0
    problems: list[str] = field(default_factory=list)
    orphans: list[str] = field(default_factory=list)
    collected: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    """Objects that this library did not write; never touched."""


def fsck(
    store: ObstoreStore, *, collect: bool = False, grace: timedelta = GRACE, now: datetime | None = None
) -> Report:
    """Verifies every manifest, part and log record.

    Args:
        store: what to check.
        collect: also remove orphans older than `grace`: parts that no manifest names, interrupted local
            writes, probe objects. Nothing that a manifest names is ever removed, nor a file of another program.
        grace: the age below which an orphan may be a commit in progress.
        now: the time to judge ages by.
    """
    report = Report()
    objects = {info.key: info for info in store.scan("")}
    report.num_objects = len(objects)
    named: set[str] = set()
    logs: set[str] = set()
    for key in objects:
        if key.rsplit("/", 1)[-1] == manifest.NAME:
            named.add(key)
            named.update(_check_commit(store, key, report))
        elif match := _RECORD.match(key):
            named.add(key)
            logs.add(match[1])
    for prefix in sorted(logs):
        try:
            report.num_records += sum(1 for _ in Sequence(store, prefix).read())
        except MaasError as error:
            report.problems.append(str(error))
    loose = [info for key, info in objects.items() if key not in named]
    ours = [info for info in loose if _PART.search(info.key) or info.key.startswith(f"{probe.PREFIX}/")]
    report.foreign = sorted(info.key for info in loose if info not in ours and info.key.split("/")[0] not in LOGS)
    staged = list(store.staged())
    deadline = (now or datetime.now(UTC)) - grace
    for info in [*ours, *staged]:
        if collect and info.modified <= deadline:
            _remove(store, info, is_staged=info in staged)
            report.collected.append(info.key)
        else:
            report.orphans.append(info.key)
    return report


def _check_commit(store: ObstoreStore, key: str, report: Report) -> set[str]:
    """Verifies one commit; returns the keys that its manifest names."""
    prefix = key.removesuffix(f"/{manifest.NAME}")
    try:
        kind = str(manifest.unseal(key, store.get(key)).get("kind"))
        committed = manifest.open_committed(store, prefix, kind)
    except MaasError as error:
        report.problems.append(str(error))
        # Its parts may still be good: keep them for whoever repairs the manifest.
        return {info.key for info in store.scan(prefix)}
    report.num_commits += 1
    report.problems.extend(str(problem) for problem in manifest.verify(committed))
    return {part.key for part in committed.parts.values()}


def _remove(store: ObstoreStore, info: ObjectInfo, is_staged: bool) -> None:
    if is_staged:
        store.delete_staged(info)
    else:
        store.delete([info.key])
