"""Append-only sequences: the next number by create-only put is all that ever moves. Knows no event's meaning.

    <prefix>/log/00000000000000000001.json    {seq, previous: digest of the record before, event, digest}

On a store with create-only puts this gives a linearizable log without a lock: two writers race for the next
number, one wins, the other reads what was appended and tries again.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from maas_ray.errors import Conflict, ObjectCorrupt, StoreUnavailable
from maas_ray.store.manifest import FORMAT, seal, unseal
from maas_ray.store.objects import ObjectStore

MAX_ATTEMPTS = 64


@dataclass(frozen=True)
class Record:
    """One record: its number (from 1), the event and the time it was written (seconds since 1970)."""

    seq: int
    event: Mapping[str, Any]
    time_s: float
    digest: str


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
            ObjectCorrupt: a record is altered, missing from the middle, or does not follow the one before it.
        """
        previous = self._load(after).digest if after else ""
        expected = after + 1
        for info in self._store.scan(self._prefix, after=self._key(after) if after else None):
            if info.key != self._key(expected):
                raise ObjectCorrupt(f"the log {self._prefix} continues with {info.key}; record {expected} is missing")
            record, follows = self._parse(info.key, self._store.get(info.key))
            if follows != previous:
                raise ObjectCorrupt(f"the log record {info.key} does not follow the record before it; not used")
            yield record
            previous, expected = record.digest, expected + 1

    def append(
        self, make_event: Callable[[list[Record]], Mapping[str, Any]], known: list[Record] | None = None
    ) -> Record:
        """Appends one event, decided upon everything that was appended before it.

        Args:
            make_event: given all records so far, returns the event (or raises to give up). Called again
                each time another writer was faster.
            known: records that the caller has already read, to save reading them again.

        Raises:
            StoreUnavailable: other writers won the race `MAX_ATTEMPTS` times.
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
            try:
                self._store.put_new(self._key(seq), seal(body))
            except Conflict:
                # Ours, if a put succeeded and only its answer was lost; else another writer's.
                raw = unseal(self._key(seq), self._store.get(self._key(seq)))
                if raw.get("token") != token:
                    continue
            return self._load(seq)
        raise StoreUnavailable(
            f"{MAX_ATTEMPTS} attempts to append to {self._prefix} lost against other writers; try again later"
        )

    def _key(self, seq: int) -> str:
        return f"{self._prefix}/{seq:020d}.json"

    def _load(self, seq: int) -> Record:
        return self._parse(self._key(seq), self._store.get(self._key(seq)))[0]

    def _parse(self, key: str, data: bytes) -> tuple[Record, str]:
        body = unseal(key, data)
        if body.get("format") != FORMAT or self._key(body.get("seq", 0)) != key:
            raise ObjectCorrupt(f"the log record {key} says that it is number {body.get('seq')!r}; not used")
        return Record(body["seq"], body["event"], body["time_s"], body["digest"]), body["previous"]
