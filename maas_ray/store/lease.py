"""Leases: one owner at a time of what a prefix names, known to all by an append-only sequence. Knows no run.

    <prefix>/owners/log/…          {type: take, owner, host, pid, machine, since_s} and {type: release, owner}
    <prefix>/owners/beat-<owner>   the owner's counter, written every few seconds; removed with the lease

A lease is taken by appending to the sequence, so of two takers one wins. Clocks of machines differ, so nobody compares
them: whoever wants a lease that is held watches its counter, and takes it over after it has not moved for the bound, or
at once if the owner ran on this machine and is dead. An owner that was only slow finds out before it commits: a
later record in the sequence means that its lease is over (Gray and Cheriton 1989, with fencing by number).
"""

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from maas_ray.display import get_logger
from maas_ray.errors import Conflict, MaasError, NotFound, StoreError, StoreUnavailable
from maas_ray.store.objects import ObjectStore
from maas_ray.store.sealed import Count, Document, Time, read_document
from maas_ray.store.sequence import RECORD, Record, Sequence

BEAT_S = 4.0
"""Time between two signs of life."""
BOUND_S = 30.0
"""An owner of whom no sign of life was seen for so long has lost its lease to whoever asks next."""
_LOOK_S = 0.5

log = get_logger(__name__)


class LeaseOwner(Document):
    """Who holds a lease, as the sequence says."""

    type: Literal["take", "release"]
    owner: str
    host: str = ""
    pid: Count = 0
    machine: str = ""
    """Of one start of one machine, or container: process ids compare only within."""
    process: str = ""
    """When the process began, in the machine's own count: a process id is given again some day."""
    since_s: Time = 0.0

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since_s).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, since {since}"


def read_owner(record: Record) -> LeaseOwner:
    """What a record of a lease says. Raises `ObjectCorrupt`."""
    return read_document(LeaseOwner, record.event, f"the log record {record.key}")


@dataclass(frozen=True)
class Claim:
    """A lease that was taken, for every process that commits in its owner's name. Plain values: it is sent to others.

    Args:
        prefix: what it is a lease of.
        number: of the record with which it was taken; any later record ends it.
        what: for messages: `run 'digits'`.
    """

    prefix: str
    number: int
    what: str

    def check(self, store: ObjectStore) -> None:
        """To be called before a commit.

        Raises:
            Conflict: the lease is over; says who has it.
        """
        log_prefix = f"{self.prefix}/owners/log"
        found = store.scan(log_prefix, after=f"{log_prefix}/{self.number:020d}.json")
        if not any(RECORD.fullmatch(info.key) for info in found):
            return
        holder = _holder(list(Sequence(store, f"{self.prefix}/owners").read()))
        by = f"was taken over by {holder}" if holder is not None else "is over"
        raise Conflict(f"the lease of {self.what} {by}; this process commits nothing more")


class Lease:
    """A lease that this process holds, with the thread that shows that it lives. `close` it, or use it as a context.

    Args:
        store: where.
        claim: what was taken.
        owner: the id that was written down.
        beat_s: time between two signs of life.
    """

    def __init__(self, store: ObjectStore, claim: Claim, owner: str, beat_s: float = BEAT_S) -> None:
        self.claim = claim
        self.lost: Conflict | None = None
        """Why it is over, once this process has found out; it has then to end what it does."""
        self._store = store
        self._owner = owner
        self._beat_s = beat_s
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease of {claim.what}", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check(self) -> None:
        """Raises `Conflict` if the lease is over."""
        self.claim.check(self._store)

    def close(self) -> None:
        """Gives the lease back. A store that is away is left alone: the next owner waits for the bound."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(timeout=BOUND_S)
        with suppress(MaasError):
            sequence = Sequence(self._store, f"{self.claim.prefix}/owners")

            def release(records: list[Record]) -> Mapping[str, Any]:
                if records[-1].seq != self.claim.number:
                    raise Conflict(f"the lease of {self.claim.what} is over")
                return {"type": "release", "owner": self._owner}

            sequence.append(release)
        with suppress(MaasError):
            self._store.delete([_beat_key(self.claim.prefix, self._owner)])

    def _beat(self) -> None:
        key, number = _beat_key(self.claim.prefix, self._owner), 0
        while True:
            try:
                self._store.put(key, json.dumps({"beat": number}).encode())
                self.claim.check(self._store)
            except Conflict as error:
                self.lost = error
                with suppress(MaasError):
                    self._store.delete([key])
                return
            except MaasError as error:  # a store that is away: others cannot see it either
                log.warning("no sign of life for the lease of %s: %s", self.claim.what, error)
            number += 1
            if self._ended.wait(self._beat_s):
                return


def take(
    store: ObjectStore,
    prefix: str,
    what: str,
    *,
    waits: bool,
    hint: str = "",
    bound_s: float = BOUND_S,
    beat_s: float = BEAT_S,
    on_wait: Callable[[str], None] | None = None,
) -> Lease:
    """Takes the lease of what a prefix names.

    Args:
        store: where.
        prefix: what.
        what: the same for people: `run 'digits'`.
        waits: whether to watch an owner that may be dead, for up to `bound_s`, and to take over from one that shows no
            sign of life. Without it a lease that is held is refused at once, unless its owner is known to be dead.
        hint: the way out, for the message.
        bound_s: see `BOUND_S`; the same for all who take leases of one thing.
        beat_s: see `BEAT_S`.
        on_wait: called with what is waited for, if anything is.

    Raises:
        Conflict: another process has it and lives; the message says which.
    """
    sequence = Sequence(store, f"{prefix}/owners")
    mine = LeaseOwner(
        type="take",
        owner=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        machine=machine_id(),
        process=_process(os.getpid()) or "",
        since_s=time.time(),
    )
    records = list(sequence.read())
    holder = _holder(records)
    if holder is not None and not is_dead(holder):
        if not waits:
            raise _taken(what, holder, hint)
        if on_wait is not None:
            on_wait(f"{what} is held by {holder}; waiting up to {bound_s:g} s for a sign of life")
        _watch(store, sequence, prefix, what, holder, bound_s, hint)

    def claim(now: list[Record]) -> Mapping[str, Any]:
        other = _holder(now)
        if other is not None and (holder is None or other.owner != holder.owner):
            raise _taken(what, other, hint)
        return mine.model_dump()

    record = sequence.append(claim, records)
    if holder is not None:
        with suppress(MaasError):
            store.delete([_beat_key(prefix, holder.owner)])
    return Lease(store, Claim(prefix, record.seq, what), mine.owner, beat_s)


def holder_of(store: ObjectStore, prefix: str) -> LeaseOwner | None:
    """Who has the lease of what a prefix names, dead or alive; None: nobody."""
    return _holder(list(Sequence(store, f"{prefix}/owners").read()))


def is_dead(owner: LeaseOwner) -> bool:
    """Whether an owner is known to be dead: it ran on this machine and does not any more. False: nobody knows."""
    if not owner.machine or not owner.process or owner.machine != machine_id():
        return False
    return _process(owner.pid) != owner.process


def machine_id() -> str:
    """Of this start of this machine, and of this container's process ids; empty where the system does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> str | None:
    """When a process began, in clock ticks since the machine did; None: there is none, or it is dead and not reaped."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _watch(
    store: ObjectStore, sequence: Sequence, prefix: str, what: str, holder: LeaseOwner, bound_s: float, hint: str
) -> None:
    """Returns once an owner was without a sign of life for the bound, or is gone. Raises `Conflict` at a sign."""
    first, looked, watched_s = _look(store, prefix, holder), time.monotonic(), 0.0
    while watched_s < bound_s and not is_dead(holder):
        time.sleep(_LOOK_S)
        if _look(store, prefix, holder) != first:
            now = _holder(list(sequence.read()))
            if now is None:
                return  # it was given back just now
            raise _taken(what, now, hint)
        # Not more than was watched: a machine that slept has stopped both, and must not find the other one late.
        now_s = time.monotonic()
        watched_s, looked = watched_s + min(now_s - looked, 4 * _LOOK_S), now_s


def _look(store: ObjectStore, prefix: str, holder: LeaseOwner) -> bytes | None:
    try:
        return store.get(_beat_key(prefix, holder.owner))
    except NotFound:
        return None
    except StoreUnavailable:
        raise  # nobody can be seen then, alive or not
    except StoreError:
        return b""  # a local file is being written in this moment, which is a sign of life as well


def _holder(records: list[Record]) -> LeaseOwner | None:
    last = read_owner(records[-1]) if records else None
    return last if last is not None and last.type == "take" else None


def _taken(what: str, holder: LeaseOwner, hint: str) -> Conflict:
    return Conflict(f"{what} is held by {holder}{f'; {hint}' if hint else ''}")


def _beat_key(prefix: str, owner: str) -> str:
    return f"{prefix}/owners/beat-{owner}"
