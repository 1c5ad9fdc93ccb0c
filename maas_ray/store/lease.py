"""Leases: exclusive ownership of a prefix, recorded in an append-only sequence. Independent of runs.

    <prefix>/owners/log/…          {type: take, owner, host, pid, machine, since_s} and {type: release, owner}
    <prefix>/owners/beat-<owner>   the owner's heartbeat counter, written every few seconds; removed with the lease

A process takes a lease by appending to the sequence, so only one of two processes succeeds. Clocks of machines differ,
so they are never compared: a process that wants a held lease watches its counter, and takes the lease over once the
counter has not changed for the bound, or at once if the owner ran on this machine and is dead. An owner that was only
slow detects this before it commits: a later record in the sequence ends its lease (Gray and Cheriton 1989, with fencing
by number).
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
"""Interval between heartbeats."""
BOUND_S = 30.0
"""Time without a heartbeat after which another process may take over the lease."""
_LOOK_S = 0.5

log = get_logger(__name__)


class LeaseOwner(Document):
    """The owner of a lease, as recorded in the sequence."""

    type: Literal["take", "release"]
    owner: str
    host: str = ""
    pid: Count = 0
    machine: str = ""
    """Id of one boot of one machine or container: process ids are comparable only within it."""
    process: str = ""
    """Start time of the process in the machine's clock ticks, because process ids are reused."""
    since_s: Time = 0.0

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.since_s).strftime("%Y-%m-%d %H:%M:%S")
        return f"process {self.pid} on {self.host}, since {since}"


def read_owner(record: Record) -> LeaseOwner:
    """The owner in a lease record. Raises `ObjectCorrupt`."""
    return read_document(LeaseOwner, record.event, f"the log record {record.key}")


@dataclass(frozen=True)
class Claim:
    """A lease that was taken, for all processes that commit on behalf of its owner. Consists of plain values.

    Args:
        prefix: prefix that is leased.
        number: number of the record with which it was taken; any later record ends the lease.
        what: name of the leased object for messages: `run 'digits'`.
    """

    prefix: str
    number: int
    what: str

    def check(self, store: ObjectStore) -> None:
        """Checks that the lease is still valid; must be called before a commit.

        Raises:
            Conflict: the lease has ended; the message names the new owner.
        """
        log_prefix = f"{self.prefix}/owners/log"
        found = store.scan(log_prefix, after=f"{log_prefix}/{self.number:020d}.json")
        if not any(RECORD.fullmatch(info.key) for info in found):
            return
        holder = _holder(list(Sequence(store, f"{self.prefix}/owners").read()))
        by = f"was taken over by {holder}" if holder is not None else "has ended"
        raise Conflict(f"the lease of {self.what} {by}; this process stops committing")


class Lease:
    """A lease held by this process, with its heartbeat thread. `close` it, or use it as a context manager.

    Args:
        store: store with the lease.
        claim: the claim that was taken.
        owner: id of the owner in the record.
        beat_s: interval between heartbeats.
    """

    def __init__(self, store: ObjectStore, claim: Claim, owner: str, beat_s: float = BEAT_S) -> None:
        self.claim = claim
        self.lost: Conflict | None = None
        """Why the lease has ended, once this process has detected it; the process must then stop its work."""
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
        """Raises `Conflict` if the lease has ended."""
        self.claim.check(self._store)

    def close(self) -> None:
        """Releases the lease. Ignores an unavailable store: the next owner then waits for the bound."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(timeout=BOUND_S)
        with suppress(MaasError):
            sequence = Sequence(self._store, f"{self.claim.prefix}/owners")

            def release(records: list[Record]) -> Mapping[str, Any]:
                if records[-1].seq != self.claim.number:
                    raise Conflict(f"the lease of {self.claim.what} has ended")
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
            except MaasError as error:  # an unavailable store: other processes cannot read it either
                log.warning("cannot write the heartbeat for the lease of %s: %s", self.claim.what, error)
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
    """Takes the lease of a prefix.

    Args:
        store: store with the lease.
        prefix: prefix to lease.
        what: name of the leased object for messages: `run 'digits'`.
        waits: whether to watch an owner that may be dead for up to `bound_s`, and to take over from one without
            heartbeats. If false, a held lease raises at once, unless its owner is known to be dead.
        hint: the way out, for the message.
        bound_s: see `BOUND_S`; must be the same for all processes that take leases of one prefix.
        beat_s: see `BEAT_S`.
        on_wait: called with a message before waiting.

    Raises:
        Conflict: another live process holds the lease; the message names it.
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
            on_wait(f"{what} is held by {holder}; waiting up to {bound_s:g} s for a heartbeat")
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
    """The owner of the lease of a prefix, dead or alive; None: no owner."""
    return _holder(list(Sequence(store, f"{prefix}/owners").read()))


def is_dead(owner: LeaseOwner) -> bool:
    """Whether an owner is known to be dead: it ran on this machine and no longer does. False: unknown."""
    if not owner.machine or not owner.process or owner.machine != machine_id():
        return False
    return _process(owner.pid) != owner.process


def machine_id() -> str:
    """Id of this boot of this machine and of this container's process namespace; empty if the system has none."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return ""


def _process(pid: int) -> str | None:
    """Start time of a process in clock ticks since boot; None: there is no such process, or it is a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _watch(
    store: ObjectStore, sequence: Sequence, prefix: str, what: str, holder: LeaseOwner, bound_s: float, hint: str
) -> None:
    """Returns once an owner has had no heartbeat for the bound, or is gone. Raises `Conflict` at a heartbeat."""
    first, looked, watched_s = _look(store, prefix, holder), time.monotonic(), 0.0
    while watched_s < bound_s and not is_dead(holder):
        time.sleep(_LOOK_S)
        if _look(store, prefix, holder) != first:
            now = _holder(list(sequence.read()))
            if now is None:
                return  # released in the meantime
            raise _taken(what, now, hint)
        # Counts only watched time: while a machine sleeps both processes stop, and the other one must not appear late.
        now_s = time.monotonic()
        watched_s, looked = watched_s + min(now_s - looked, 4 * _LOOK_S), now_s


def _look(store: ObjectStore, prefix: str, holder: LeaseOwner) -> bytes | None:
    try:
        return store.get(_beat_key(prefix, holder.owner))
    except NotFound:
        return None
    except StoreUnavailable:
        raise  # no heartbeat can be read then
    except StoreError:
        return b""  # a local file is being written at this moment, which counts as a heartbeat


def _holder(records: list[Record]) -> LeaseOwner | None:
    last = read_owner(records[-1]) if records else None
    return last if last is not None and last.type == "take" else None


def _taken(what: str, holder: LeaseOwner, hint: str) -> Conflict:
    return Conflict(f"{what} is held by {holder}{f'; {hint}' if hint else ''}")


def _beat_key(prefix: str, owner: str) -> str:
    return f"{prefix}/owners/beat-{owner}"
