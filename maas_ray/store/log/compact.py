"""Retention of append-only sequences: writes missing snapshots, and removes records that two other objects contain.

Afterward every record is in at least two objects that were read and verified: the newest snapshots, and a second set of
snapshots and single records that shares no object with the first. The chain of digests is verified through either set.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from maas_ray.errors import NotFound, ObjectCorrupt, SpecError
from maas_ray.store.fetch import get_each, in_parallel
from maas_ray.store.log.reader import verified
from maas_ray.store.log.record import RECORD, parse_record, record_key
from maas_ray.store.log.snapshot import UNIT, chain, end_of, first_of, plan, snapshot_key
from maas_ray.store.objects import ObjectInfo, ObjectStore
from maas_ray.store.sequence import MIN_GRACE_S, Sequence

GRACE = timedelta(hours=24)
"""Minimum age for removal: a process that has listed a younger object may still be reading it."""


@dataclass(frozen=True)
class Compacted:
    """The changes to one log."""

    log: str
    num_records: int
    written: tuple[str, ...] = ()
    """Snapshots that were missing or damaged and are now written."""
    removed: tuple[str, ...] = ()
    """Removed records and snapshots, whose content is in two other objects."""


def compact(
    store: ObjectStore,
    prefix: str,
    *,
    remove: bool = False,
    grace: timedelta = GRACE,
    now: datetime | None = None,
) -> Compacted:
    """Writes the snapshots that are due, and removes objects that are no longer needed.

    Args:
        store: store with the log.
        prefix: prefix of the log.
        remove: whether to remove anything; versions of this library before snapshots then cannot read the log.
        grace: minimum age for removal, at least an hour, so that no process follows the log from a removed record.
        now: the time from which ages are computed.

    Raises:
        SpecError: the grace is too short.
        ObjectCorrupt: a record is damaged or missing; nothing was removed.
    """
    if grace.total_seconds() < MIN_GRACE_S:
        raise SpecError(
            f"grace {grace} is too short: processes that follow a log could miss removed records; set at least an hour"
        )
    sequence = Sequence(store, prefix)
    place = sequence.place
    infos = {info.key: info for info in store.scan(place)}
    numbers = {int(match[2]) for key in infos if (match := RECORD.fullmatch(key)) and f"{match[1]}/log" == place}
    ends = {end for key in infos if (end := end_of(key, place)) is not None}
    length = max(numbers | ends, default=0)
    newest = length // UNIT * UNIT
    written = [end for end in reversed(list(chain(newest))) if _make_whole(sequence, store, end)]
    removed: list[str] = []
    if remove and newest:
        kept = {snapshot_key(place, end) for end in chain(newest)} | _second(store, place, newest, ends, numbers)
        deadline = (now or datetime.now(UTC)) - grace
        removed = sorted(_removable(infos.values(), place, newest, kept, deadline))
        in_parallel(lambda key: store.delete([key]), removed)
    return Compacted(prefix, length, tuple(snapshot_key(place, end) for end in written), tuple(removed))


def _digests(store: ObjectStore, place: str, end: int) -> dict[int, str]:
    """The digests of the records in a snapshot, by number. Raises `NotFound` or `ObjectCorrupt`."""
    data, last = get_each(store, [snapshot_key(place, end), record_key(place, end)])
    if isinstance(data, NotFound):
        raise data
    return {record.seq: record.digest for record, _ in verified(place, end, data, last)[0]}


def _make_whole(sequence: Sequence, store: ObjectStore, end: int) -> bool:
    """Writes a snapshot if it is missing or damaged; returns whether it was."""
    key = snapshot_key(sequence.place, end)
    try:
        _digests(store, sequence.place, end)
        return False
    except NotFound:
        pass
    except ObjectCorrupt:
        sequence.reader.lines(first_of(end), end)  # checks first that its records are also elsewhere
        store.delete([key])
    sequence.write_snapshot(end)
    return True


def _second(store: ObjectStore, place: str, newest: int, ends: set[int], numbers: set[int]) -> set[str]:
    """Keys of a second set of objects that contains every record up to `newest`; each was read and compared."""
    first: dict[int, str] = {}
    for end in chain(newest):
        first |= _digests(store, place, end)
    others = ends - set(chain(newest))
    while True:
        by_snapshot, singles = plan(1, newest, others)
        bad = {end for end in by_snapshot if not _agrees(store, place, end, first)}
        if not bad:
            break
        others -= bad
    if missing := sorted(set(singles) - numbers):
        raise ObjectCorrupt(
            f"the log {place} has record {missing[0]} in only one snapshot; nothing was removed; append more records, "
            "then run maas-ray compact again"
        )
    keys = [record_key(place, seq) for seq in singles]
    for seq, data in zip(singles, get_each(store, keys), strict=True):
        if isinstance(data, NotFound) or parse_record(place, seq, data)[0].digest != first[seq]:
            raise ObjectCorrupt(
                f"the log {place} has two different records {seq}; nothing was removed; run maas-ray fsck"
            )
    return {*keys, *(snapshot_key(place, end) for end in by_snapshot)}


def _agrees(store: ObjectStore, place: str, end: int, first: dict[int, str]) -> bool:
    try:
        return all(first[seq] == digest for seq, digest in _digests(store, place, end).items())
    except (NotFound, ObjectCorrupt):
        return False


def _removable(
    infos: Iterable[ObjectInfo], place: str, newest: int, kept: set[str], deadline: datetime
) -> Iterable[str]:
    for info in infos:
        match = RECORD.fullmatch(info.key)
        is_record = match is not None and f"{match[1]}/log" == place and int(match[2]) <= newest
        if (is_record or end_of(info.key, place) is not None) and info.key not in kept and info.modified <= deadline:
            yield info.key
