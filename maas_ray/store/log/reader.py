"""Reads an append-only sequence with few requests: the newest snapshots and the records after them, in parallel.

A snapshot that is damaged or missing costs time, but no data: the earlier snapshots and the single records contain the
same records. Every returned record is verified, and follows the record before it.
"""

from collections.abc import Iterable
from functools import lru_cache

from maas_ray.display import get_logger
from maas_ray.errors import NotFound, ObjectCorrupt
from maas_ray.store.fetch import MAX_PARALLEL, get_each
from maas_ray.store.log.record import RECORD, Record, parse_record, record_key
from maas_ray.store.log.snapshot import UNIT, chain, decode, end_of, plan, snapshot_key
from maas_ray.store.objects import ObjectInfo, ObjectStore
from maas_ray.store.sealed import seal, unseal

ATTEMPTS = 3
"""Attempts to read a log whose objects are being removed by retention at the same time."""

log = get_logger(__name__)

Pair = tuple[Record, str]
"""A record, and the digest of the record before it."""


class LogReader:
    """Reads the records of one log.

    Args:
        store: where they are stored.
        place: `<prefix>/log`.
    """

    def __init__(self, store: ObjectStore, place: str) -> None:
        self._store = store
        self._place = place
        self._recent: dict[int, bytes] = {}
        """Bytes of the newest records that were read or written here, for the next snapshot."""
        self.end = 0
        """Last record of the newest known snapshot."""
        self.is_behind = False
        """Whether a snapshot was missing in the last listing: its writer died, or is of a version before snapshots."""

    def after(self, last: Record | None) -> list[Record]:
        """All records after a known one, in order; needs one or two listings for any number of records.

        Raises:
            NotFound: the known record no longer exists: the store was changed.
            ObjectCorrupt: a record is altered, malformed, missing, or does not follow the one before it.
        """
        if last is None:
            return self._linked(self._pairs(1), "")
        records = self.after_number(last.seq - 1)
        self._check_known(last, records[0] if records else None)
        return records[1:]

    def after_number(self, seq: int) -> list[Record]:
        """As `after`, for a record known only by its number; 0: all records. Raises `NotFound`: no such record."""
        if seq == 0:
            return self.after(None)
        records = self._linked(self._pairs(seq), None)
        if not records:
            raise NotFound(f"the log {self._place} has no record {seq}")
        return records[1:]

    def newer(self, last: Record | None) -> list[Record]:
        """As `after`, without a listing: two requests if there are no new records, one if the log is empty.

        Only for callers that have read the log recently, see `sequence.FRESH_S`: records that retention has removed
        meanwhile appear as if they had never existed.
        """
        known, found = last, list[Record]()
        width = 1
        while True:
            start = (last.seq if last is not None else 0) + 1
            numbers = range(start, start + width)
            for seq, data in zip(numbers, get_each(self._store, map(self._key, numbers)), strict=True):
                if isinstance(data, NotFound):
                    # A removed store must not appear as one without new records. New records follow the known one.
                    return found if found or known is None else self._none_after(known)
                (last,) = self._linked([self._parse(seq, data)], last.digest if last is not None else "")
                found.append(last)
            if width >= MAX_PARALLEL:
                return found + self.after(last)
            width *= 2

    def _none_after(self, known: Record) -> list[Record]:
        """Returns no records, after checking that the known record still exists."""
        try:
            data = self._store.get(known.key)
        except NotFound:
            return self.after(known)
        self._check_known(known, self._parse(known.seq, data)[0])
        return []

    def last(self) -> Record | None:
        """The newest record; None: the log is empty."""
        for _ in range(ATTEMPTS):
            end, numbers = self._look(1)
            newest = numbers[-1] if numbers else end
            if newest == 0:
                return None
            try:
                return self._parse(newest, self._store.get(self._key(newest)))[0]
            except NotFound:  # retention has kept only the snapshot
                if (pairs := self._fetch(newest, end, [])) is not None:
                    return pairs[-1][0]
        raise self._vanished()

    def lines(self, first: int, last: int) -> list[bytes]:
        """The bytes of the records `first` … `last`, for a snapshot; read from earlier snapshots where possible."""
        lines: dict[int, bytes] = {}
        ends = set(range(UNIT, last, UNIT))
        if self._fetch(first, last, [], ends=ends, lines=lines) is None:
            raise self._vanished()
        return [lines[seq] for seq in range(first, last + 1)]

    def remember(self, seq: int, data: bytes) -> None:
        """Stores the bytes of a record that was just written."""
        self._recent[seq] = data
        while len(self._recent) > 2 * UNIT:
            del self._recent[min(self._recent)]

    def forget(self, seq: int) -> None:
        """Reverts `remember`."""
        self._recent.pop(seq, None)

    def listed(self) -> tuple[list[int], list[int]]:
        """Last records of all snapshots, and numbers of all single records, ascending; lists everything."""
        ends, numbers = [], []
        for info in self._store.scan(self._place):
            if (end := end_of(info.key, self._place)) is not None:
                ends.append(end)
            elif (number := self._number(info)) is not None:
                numbers.append(number)
        return sorted(ends), sorted(numbers)

    def _pairs(self, first: int) -> list[Pair]:
        for _ in range(ATTEMPTS):
            end, numbers = self._look(first)
            if (pairs := self._fetch(first, end, numbers)) is not None:
                return pairs
        raise self._vanished()

    def _look(self, first: int) -> tuple[int, list[int]]:
        """The newest snapshot's last record, and the numbers of the records after it, only from `first` on."""
        end, numbers = 0, []
        for info in self._store.scan(self._place):
            if (found := end_of(info.key, self._place)) is not None:
                end = found
                break
            if (number := self._number(info)) is not None:  # there is no snapshot: the listing contains all records
                numbers.append(number)
        start = max(end, first - 1)
        if end:
            found_after = self._store.scan(self._place, after=self._key(start))
            numbers = [number for info in found_after if (number := self._number(info)) is not None]
        numbers.sort()
        self.end = max(self.end, end)
        self.is_behind = bool(numbers) and numbers[-1] // UNIT * UNIT > end
        numbers = [number for number in numbers if number > start]
        for expected, number in enumerate(numbers, start + 1):
            if number != expected:
                raise ObjectCorrupt(
                    f"the log {self._place} continues with {self._key(number)}; record {expected} is missing"
                )
        return end, numbers

    def _fetch(
        self,
        first: int,
        end: int,
        numbers: Iterable[int],
        *,
        ends: set[int] | None = None,
        lines: dict[int, bytes] | None = None,
    ) -> list[Pair] | None:
        """Fetches the records from `first` on: those up to `end` from snapshots, then the single records `numbers`.

        Args:
            first: number of the first record.
            end: number of the last record in snapshots.
            numbers: numbers of the records after it.
            ends: snapshots to use; None: those that must exist, see `snapshot.chain`.
            lines: receives the bytes of each record, if not None.

        Returns:
            None if an object was removed meanwhile.
        """
        ends = set(chain(end)) if ends is None else ends
        wanted = [number for number in numbers if number >= first]
        got: dict[str, bytes | NotFound] = {}
        if lines is not None:
            got |= {self._key(seq): data for seq, data in self._recent.items()}
        whole: dict[int, tuple[list[Pair], list[bytes]]] = {}
        failed: set[int] = set()
        while True:
            by_snapshot, singles = plan(first, end, ends)
            singles = sorted(singles) + wanted
            # With the last record of each snapshot: the snapshot must end with the log's own record.
            keys = [
                *(snapshot_key(self._place, each) for each in by_snapshot),
                *map(self._key, [*by_snapshot, *singles]),
            ]
            todo = [key for key in keys if key not in got]
            got |= dict(zip(todo, get_each(self._store, todo), strict=True))
            for each in by_snapshot:
                if each not in whole:
                    key = snapshot_key(self._place, each)
                    if found := self._decoded(each, got[key], got[self._key(each)]):
                        whole[each] = found
            bad = {each for each in by_snapshot if each not in whole}
            if not bad:
                break
            failed |= bad
            ends = self._ends() - failed
        if any(isinstance(got[self._key(seq)], NotFound) for seq in singles):
            return None
        pairs = [pair for each in by_snapshot for pair in whole[each][0] if pair[0].seq >= first]
        pairs += [self._parse(seq, got[self._key(seq)]) for seq in singles]
        if lines is not None:
            for each in by_snapshot:
                lines |= {pair[0].seq: line for pair, line in zip(*whole[each], strict=True)}
            lines |= {seq: _line(self._key(seq), got[self._key(seq)]) for seq in singles}
        return sorted(pairs, key=lambda pair: pair[0].seq)

    def _decoded(
        self, end: int, data: bytes | NotFound, last: bytes | NotFound
    ) -> tuple[list[Pair], list[bytes]] | None:
        """Decodes a snapshot if it exists, is intact, and ends with the log's own record (if retention has kept it)."""
        if isinstance(data, NotFound):
            return None
        try:
            return verified(self._place, end, data, last)
        except ObjectCorrupt as error:
            _warn(f"{error}; its records are read from other objects")
            return None

    def _ends(self) -> set[int]:
        """Last records of all existing snapshots."""
        ends = set()
        for info in self._store.scan(self._place):
            if (end := end_of(info.key, self._place)) is not None:
                ends.add(end)
            elif self._number(info) is not None:
                break  # snapshots are listed first
        return ends

    def _parse(self, seq: int, data: bytes | NotFound) -> Pair:
        if isinstance(data, NotFound):
            raise data
        pair = parse_record(self._place, seq, data)
        self.remember(seq, data)
        return pair

    def _linked(self, pairs: Iterable[Pair], previous: str | None) -> list[Record]:
        """The records, after checking that each follows the one before it; `previous` None: not for the first."""
        records = []
        for record, follows in pairs:
            if previous is not None and follows != previous:
                raise ObjectCorrupt(f"the log record {record.key} does not follow the record before it; not used")
            records.append(record)
            previous = record.digest
        return records

    def _check_known(self, last: Record, now: Record | None) -> None:
        if now is None:
            raise NotFound(f"the log record {last.key}, which was read before, no longer exists")
        if now.digest != last.digest:
            raise ObjectCorrupt(f"the log record {last.key} differs from the record that was read before; not used")

    def _vanished(self) -> ObjectCorrupt:
        """The error for a missing record; lists the whole log to name the record and damaged snapshots."""
        ends, numbers = self.listed()
        held, damaged = set(numbers), []
        for end in ends:
            key = snapshot_key(self._place, end)
            try:
                held |= {record.seq for record, _ in decode(self._place, end, self._store.get(key))[0]}
            except (NotFound, ObjectCorrupt):
                damaged.append(key)
        gap = next((seq for seq in range(1, max([*ends, *numbers, 0]) + 1) if seq not in held), None)
        if gap is None:
            return ObjectCorrupt(
                f"objects of the log {self._place} were removed while it was being read; read it again"
            )
        where = f"; damaged snapshots: {', '.join(damaged[:5])}" if damaged else ""
        return ObjectCorrupt(f"the log {self._place} cannot be read: record {gap} is missing{where}")

    def _number(self, info: ObjectInfo) -> int | None:
        match = RECORD.fullmatch(info.key)
        return int(match[2]) if match is not None and f"{match[1]}/log" == self._place else None

    def _key(self, seq: int) -> str:
        return record_key(self._place, seq)


def verified(place: str, end: int, data: bytes, last: bytes | NotFound) -> tuple[list[Pair], list[bytes]]:
    """The records of a snapshot and their bytes, as `decode`, compared with the log's own last record of them.

    Because each record contains the digest of the one before it, comparing the last record is sufficient.

    Args:
        place: place of the log.
        end: last record of the snapshot.
        data: bytes of the snapshot.
        last: bytes of that record, or `NotFound` if retention has removed it.

    Raises:
        ObjectCorrupt: the snapshot is damaged, or differs from the log.
    """
    found = decode(place, end, data)
    if not isinstance(last, NotFound):
        record, _ = parse_record(place, end, last)
        if record.digest != found[0][-1][0].digest:
            raise ObjectCorrupt(
                f"the snapshot {snapshot_key(place, end)} ends with another record than {record.key}; not used"
            )
    return found


def _line(key: str, data: bytes | NotFound) -> bytes:
    """A record in one line, in whatever layout it was written."""
    if isinstance(data, NotFound):
        raise data
    body = unseal(key, data)
    return seal({name: value for name, value in body.items() if name != "digest"})


@lru_cache(256)
def _warn(message: str) -> None:
    """Logs the warning once per process."""
    log.warning("%s", message)
