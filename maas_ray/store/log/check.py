"""Checks one append-only sequence: each record, the chain of digests, and that snapshots match the log."""

from collections.abc import Iterator

from maas_ray.errors import NotFound, ObjectCorrupt
from maas_ray.store.fetch import get_each
from maas_ray.store.log.reader import LogReader, Pair
from maas_ray.store.log.record import Record, parse_record, record_key
from maas_ray.store.log.snapshot import decode, snapshot_key
from maas_ray.store.objects import ObjectStore

_TOGETHER = 64
"""Number of records that are read at a time."""


def check_log(store: ObjectStore, prefix: str) -> Iterator[ObjectCorrupt | Record]:
    """Yields each record, or the error in it or in a snapshot, and continues after each error; for `fsck`.

    A record that retention has removed is read from a snapshot; one that is in neither place is missing.
    """
    place = f"{prefix}/log"
    ends, numbers = LogReader(store, place).listed()
    singles: dict[int, Pair] = {}
    problems: dict[int, ObjectCorrupt] = {}
    for begin in range(0, len(numbers), _TOGETHER):
        batch = numbers[begin : begin + _TOGETHER]
        found = get_each(store, [record_key(place, seq) for seq in batch])
        for seq, data in zip(batch, found, strict=True):
            try:
                singles[seq] = parse_record(place, seq, _there(data))
            except ObjectCorrupt as error:
                problems[seq] = error
    held: dict[int, tuple[Pair, str]] = {}
    for end in ends:
        yield from _check_snapshot(store, place, end, singles, held)
    yield from _check_chain(place, singles, problems, {seq: pair for seq, (pair, _) in held.items()})


def _there(data: bytes | NotFound) -> bytes:
    if isinstance(data, NotFound):
        raise ObjectCorrupt(str(data))
    return data


def _check_snapshot(
    store: ObjectStore, place: str, end: int, singles: dict[int, Pair], held: dict[int, tuple[Pair, str]]
) -> Iterator[ObjectCorrupt]:
    """The errors in one snapshot; adds the records that only snapshots contain to `held`, with the first one's key."""
    key = snapshot_key(place, end)
    try:
        pairs, _ = decode(place, end, _there(get_each(store, [key])[0]))
    except ObjectCorrupt as error:
        yield error
        return
    for pair in pairs:
        seq = pair[0].seq
        known, where = (singles[seq], pair[0].key) if seq in singles else held.setdefault(seq, (pair, key))
        if known[0].digest != pair[0].digest:
            yield ObjectCorrupt(f"the snapshot {key} contains another record {seq} than {where}; not used")
            return


def _check_chain(
    place: str, singles: dict[int, Pair], problems: dict[int, ObjectCorrupt], held: dict[int, Pair]
) -> Iterator[ObjectCorrupt | Record]:
    previous, expected = "", 1
    for seq in sorted({*singles, *problems, *held}):
        if seq != expected:
            yield ObjectCorrupt(
                f"the log {place} continues with {record_key(place, seq)}; record {expected} is missing"
            )
            previous = ""
        expected = seq + 1
        if seq in problems:
            yield problems[seq]
        pair = singles.get(seq) or held.get(seq)
        if pair is None:
            previous = ""
            continue
        record, follows = pair
        if follows != previous and (previous or seq == 1):
            yield ObjectCorrupt(f"the log record {record.key} does not follow the record before it; not used")
        yield record
        previous = record.digest
