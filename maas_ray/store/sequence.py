"""Append-only sequences, whose only mutation is the create-only put of the next record. Independent of events.

    <prefix>/log/00000000000000000001.json    {seq, previous: digest of the record before, token, event, digest}
    <prefix>/log/-99999999999999999991.jsonl  many records in one object, see log/snapshot.py

On a store with create-only puts this gives a linearizable log without a lock: two writers race for the next
number, one wins, the other reads the new records and tries again. Other files in the directory are not records.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from maas_ray.display import get_logger
from maas_ray.errors import Conflict, MaasError, NotFound, ObjectCorrupt, StoreUnavailable
from maas_ray.store.log.reader import LogReader
from maas_ray.store.log.record import RECORD, Record, parse_record, record_key
from maas_ray.store.log.snapshot import SNAPSHOT, UNIT, chain, decode, encode, first_of, snapshot_key
from maas_ray.store.manifest import FORMAT
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import seal, unseal

__all__ = ["RECORD", "SNAPSHOT", "Follower", "Record", "Sequence"]

MAX_ATTEMPTS = 64
REPEATS = 2
"""Retries of a put whose outcome is unknown."""
REPEAT_S = 10.0
"""A put that took longer is not repeated: the store is unavailable, and its own bounded retries are exhausted."""

MIN_GRACE_S = 3600.0
"""Retention keeps records whose newest snapshot is younger than this."""
FRESH_S = MIN_GRACE_S / 2
"""A process that has read the log within this time has missed no removal, and may request the next record directly."""

log = get_logger(__name__)


class Sequence:
    """The records below one prefix.

    Args:
        store: store with the records.
        prefix: prefix of the sequence, without a trailing slash.
        clock: returns seconds since 1970; replaced in tests.
    """

    def __init__(self, store: ObjectStore, prefix: str, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self.place = f"{prefix}/log"
        self._clock = clock
        self.reader = LogReader(store, self.place)

    def read(self, after: int = 0) -> Iterator[Record]:
        """All records with a number above `after`, in order, each checked against the digest of the one before it.

        Raises:
            ObjectCorrupt: a record is altered, malformed, missing from the middle, or does not follow the one before it.
        """
        yield from self.reader.after_number(after)

    def append(
        self, make_event: Callable[[list[Record]], Mapping[str, Any]], known: list[Record] | None = None
    ) -> Record:
        """Appends one event that depends on all records before it.

        A put whose response was lost is recognized by the token in the record. If the outcome of a put is unknown, the
        same number is tried again with the same token, so that the event is never appended twice.

        Args:
            make_event: returns the event from all records so far (or raises to abort). Called again each time another
                writer was faster.
            known: records that the caller has already read, to save reading them again.

        Raises:
            StoreUnavailable: other writers won the race `MAX_ATTEMPTS` times; or it is unknown whether the record was
                written, see `Registry.publish` for how a retry finds it.
        """
        records = list(known or ())

        def decide(new: list[Record]) -> Mapping[str, Any]:
            records.extend(new)
            return make_event(records)

        return Follower(self, records[-1] if records else None).append(decide)

    def note(self, event: Mapping[str, Any]) -> Record:
        """Appends an event that does not depend on other records; reads only the newest record. Raises as `append`."""
        looked = clocks()
        return Follower(self, self.reader.last(), looked).append(lambda _: event)

    def put(self, last: Record | None, event: Mapping[str, Any], token: str) -> Record | None:
        """Writes an event as the record after `last`; None: another writer was faster."""
        seq = last.seq + 1 if last is not None else 1
        data = seal(
            {
                "format": FORMAT,
                "seq": seq,
                "previous": last.digest if last is not None else "",
                "token": token,
                "time_s": self._clock(),
                "event": dict(event),
            }
        )
        if not self._put(seq, data, token):
            return None
        self.reader.remember(seq, data)
        return parse_record(self.place, seq, data)[0]

    def withdraw(self, record: Record) -> None:
        """Removes a record that was written at a number that the log had already passed, see `Follower.append`."""
        self.reader.forget(record.seq)
        self._store.delete([record.key])

    def write_snapshots(self, seq: int) -> None:
        """Writes the snapshots that are due once a log has `seq` records. The next writer retries a failed one."""
        due = [end for end in chain(seq // UNIT * UNIT) if end > self.reader.end]
        for end in reversed(due):
            try:
                self.write_snapshot(end)
            except MaasError as error:  # costs only time
                log.warning("no snapshot of %s up to record %d: %s", self.place, end, error)
                return
            self.reader.end = end
        self.reader.is_behind = False

    def write_snapshot(self, end: int) -> None:
        """Writes the snapshot that ends with a record, if it does not exist.

        Raises:
            ObjectCorrupt: a record is damaged or missing.
        """
        first = first_of(end)
        lines = self.reader.lines(first, end)
        ends = [parse_record(self.place, seq, line) for seq, line in ((first, lines[0]), (end, lines[-1]))]
        data = encode(self.place, first, end, ends[0][1], ends[-1][0].digest, lines)
        decode(self.place, end, data)  # never writes a snapshot that cannot be read
        try:
            self._store.create(snapshot_key(self.place, end), data)
        except Conflict:
            log.debug("another writer has made the snapshot of %s up to record %d", self.place, end)

    def _put(self, seq: int, data: bytes, token: str) -> bool:
        """Writes a record; returns whether the record with this number is ours or another writer's."""
        key = record_key(self.place, seq)
        began = time.monotonic()
        for remaining in reversed(range(1 + REPEATS)):
            try:
                self._store.create(key, data)
                return True
            except Conflict:
                # Ours, if a put succeeded and only its response was lost; else another writer's.
                try:
                    return unseal(key, self._store.get(key)).get("token") == token
                except NotFound as error:
                    raise ObjectCorrupt(
                        f"cannot append to the log: {key} exists but is not an object; move it away"
                    ) from error
            except StoreUnavailable:
                if not remaining or time.monotonic() - began > REPEAT_S:
                    raise
        return False


class Follower:
    """Follows one sequence and appends to it, without reading records twice. For one thread.

    Args:
        sequence: the sequence.
        last: newest known record; None: no record is known.
        looked: time, by two clocks, at which `last` was the newest record; None: long ago.
    """

    def __init__(
        self, sequence: Sequence, last: Record | None = None, looked: tuple[float, float] | None = None
    ) -> None:
        self._sequence = sequence
        self.last = last
        self._looked = looked

    def look(self) -> list[Record]:
        """The records appended since the last call; one request if there are none and the last call was recent.

        Raises:
            ObjectCorrupt: a record is altered, malformed, missing, or does not follow the one before it.
        """
        looked = clocks()
        reader = self._sequence.reader
        new = reader.newer(self.last) if _is_fresh(self._looked) else reader.after(self.last)
        self.last, self._looked = new[-1] if new else self.last, looked
        return new

    def append(self, make_event: Callable[[list[Record]], Mapping[str, Any]]) -> Record:
        """Appends one event that depends on all records before it; see `Sequence.append`.

        Args:
            make_event: returns the event from the records appended since the last call (or raises to abort). Called
                again each time another writer was faster, with that writer's records.
        """
        token = uuid.uuid4().hex
        for _ in range(MAX_ATTEMPTS):
            event = make_event(self.look())
            record = self._sequence.put(self.last, event, token)
            if record is None:
                continue
            if not _is_fresh(self._looked) and not self._is_in_place(record):
                self._sequence.withdraw(record)
                continue
            self.last = record
            if record.seq % UNIT == 0 or self._sequence.reader.is_behind:
                self._sequence.write_snapshots(record.seq)
            return record
        raise StoreUnavailable(
            f"{MAX_ATTEMPTS} attempts to append to {self._sequence.place} lost against other writers; try again later"
        )

    def _is_in_place(self, record: Record) -> bool:
        """Whether a record is part of the log.

        A writer that was suspended between its read and its put, for so long that retention has removed the record with
        this number, has written another record in its place. Readers read the snapshot's record.
        """
        found = self._sequence.reader.after_number(record.seq - 1)
        return bool(found) and found[0].digest == record.digest


def clocks() -> tuple[float, float]:
    """The time of the monotonic clock, and of the clock that also runs while the machine sleeps."""
    return time.monotonic(), time.time()


def _is_fresh(looked: tuple[float, float] | None) -> bool:
    return looked is not None and max(now - then for now, then in zip(clocks(), looked, strict=True)) < FRESH_S
