"""Append-only sequences: the next number by create-only put is all that ever moves. Knows no event's meaning.

    <prefix>/log/00000000000000000001.json    {seq, previous: digest of the record before, token, event, digest}

On a store with create-only puts this gives a linearizable log without a lock: two writers race for the next
number, one wins, the other reads what was appended and tries again. Other files in the directory are nobody's records.
"""

import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maas_ray.errors import Conflict, NotFound, ObjectCorrupt, StoreUnavailable
from maas_ray.store.manifest import FORMAT
from maas_ray.store.objects import ObjectInfo, ObjectStore
from maas_ray.store.sealed import Count, Document, Time, read_document, seal, unseal

MAX_ATTEMPTS = 64
REPEATS = 2
"""Times that a put is repeated of which the store did not say whether it arrived."""
REPEAT_S = 10.0
"""A put that took longer than this is not repeated: the store is away, and its own bounded retries were used up."""

RECORD = re.compile(r"(.+)/log/(\d{20})\.json")
"""Keys of records: the sequence's prefix and the number."""


@dataclass(frozen=True)
class Record:
    """One record: its number (from 1), the event and the time it was written (seconds since 1970)."""

    seq: int
    event: Mapping[str, Any]
    time_s: float
    digest: str
    key: str = ""
    """Where it is stored, for messages about its event."""


class Sequence:
    """The records below one prefix.

    Args:
        store: where they lie.
        prefix: their place, without a slash at the end.
        clock: seconds since 1970; passed in by tests.
    """

    def __init__(self, store: ObjectStore, prefix: str, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._prefix = f"{prefix}/log"
        self._clock = clock

    def read(self, after: int = 0) -> Iterator[Record]:
        """All records with a number above `after`, in order, each checked against the digest of the one before it.

        Raises:
            ObjectCorrupt: a record is altered, malformed, missing from the middle, or does not follow the one before it.
        """
        previous = self._load(after).digest if after else ""
        expected = after + 1
        for key in self._keys(self._store.scan(self._prefix, after=self._key(after) if after else None)):
            if key != self._key(expected):
                raise ObjectCorrupt(f"the log {self._prefix} continues with {key}; record {expected} is missing")
            record, follows = self._parse(key, self._store.get(key))
            if follows != previous:
                raise ObjectCorrupt(f"the log record {key} does not follow the record before it; not used")
            yield record
            previous, expected = record.digest, expected + 1

    def problems(self) -> Iterator[ObjectCorrupt | Record]:
        """Each record, or what is wrong with it, going on after each problem; for `fsck`."""
        previous, expected = "", 1
        for key in self._keys(self._store.scan(self._prefix)):
            number = int(key[-25:-5])
            if number != expected:
                yield ObjectCorrupt(f"the log {self._prefix} continues with {key}; record {expected} is missing")
                previous = ""
            try:
                record, follows = self._parse(key, self._store.get(key))
            except (ObjectCorrupt, NotFound) as error:
                yield error if isinstance(error, ObjectCorrupt) else ObjectCorrupt(str(error))
                previous, expected = "", number + 1
                continue
            if follows != previous and (previous or number == 1):
                yield ObjectCorrupt(f"the log record {key} does not follow the record before it; not used")
            yield record
            previous, expected = record.digest, number + 1

    def append(
        self, make_event: Callable[[list[Record]], Mapping[str, Any]], known: list[Record] | None = None
    ) -> Record:
        """Appends one event, decided upon everything that was appended before it.

        A put whose answer was lost is recognized by the token in the record. Where the store does not say whether one
        arrived, the same number is tried again with the same token, so that the event is never there twice.

        Args:
            make_event: given all records so far, returns the event (or raises to give up). Called again
                each time another writer was faster.
            known: records that the caller has already read, to save reading them again.

        Raises:
            StoreUnavailable: other writers won the race `MAX_ATTEMPTS` times; or the store did not say whether the
                record is there, see `Registry.publish` for how a repeat finds it.
        """
        records = list(known or ())
        token = uuid.uuid4().hex
        for _ in range(MAX_ATTEMPTS):
            records.extend(self.read(after=records[-1].seq if records else 0))
            seq = len(records) + 1
            body = {
                "format": FORMAT,
                "seq": seq,
                "previous": records[-1].digest if records else "",
                "token": token,
                "time_s": self._clock(),
                "event": dict(make_event(records)),
            }
            if self._put(seq, seal(body), token):
                return self._load(seq)
        raise StoreUnavailable(
            f"{MAX_ATTEMPTS} attempts to append to {self._prefix} lost against other writers; try again later"
        )

    def _put(self, seq: int, data: bytes, token: str) -> bool:
        """Whether the record with this number is ours; another writer's, if not."""
        key = self._key(seq)
        began = time.monotonic()
        for remaining in reversed(range(1 + REPEATS)):
            try:
                self._store.put_new(key, data)
                return True
            except Conflict:
                # Ours, if a put succeeded and only its answer was lost; else another writer's.
                try:
                    return unseal(key, self._store.get(key)).get("token") == token
                except NotFound as error:
                    raise ObjectCorrupt(
                        f"the log cannot go on: something that is no object has the name {key}; move it away"
                    ) from error
            except StoreUnavailable:
                if not remaining or time.monotonic() - began > REPEAT_S:
                    raise
        return False

    def _keys(self, found: Iterable[ObjectInfo]) -> Iterator[str]:
        """The records among what a listing found."""
        matches = (RECORD.fullmatch(info.key) for info in found)
        return (match[0] for match in matches if match is not None and f"{match[1]}/log" == self._prefix)

    def _key(self, seq: int) -> str:
        return f"{self._prefix}/{seq:020d}.json"

    def _load(self, seq: int) -> Record:
        return self._parse(self._key(seq), self._store.get(self._key(seq)))[0]

    def _parse(self, key: str, data: bytes) -> tuple[Record, str]:
        said = read_document(_Record, unseal(key, data), f"the log record {key}")
        if said.format != FORMAT or self._key(said.seq) != key:
            raise ObjectCorrupt(f"the log record {key} says that it is number {said.seq}; not used")
        return Record(said.seq, said.event, said.time_s, said.digest, key), said.previous


class _Record(Document):
    format: int
    seq: Count
    previous: str
    time_s: Time
    event: dict[str, Any]
    digest: str
    token: str = ""
