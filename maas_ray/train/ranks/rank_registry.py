"""The registry of a run's ranks: who is there, how far each one is, and the step after which all of them leave.

Ranks send a `Heartbeat` about once a second, from a thread beside training (train/ranks/heartbeat.py), and get a `Directive` back. Knows no
Ray, no torch and no clock but the one it is given.

How all ranks leave after the same step, without a message between them in any step: once somebody has asked for it,
each rank answers with a limit a little ahead of where it is, beyond which it will not train before it knows more. When
all limits are here, the largest is the step. No rank has passed its own limit, so none has passed that step; and all
learn of it, because a rank that reaches its limit waits. Clocks, speeds and the order of messages play no part in it:
they only decide whether somebody waits for a moment.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heartbeat:
    """What one rank says of itself."""

    attempt: int
    rank: int
    first_step: int | None = None
    """Steps that were done when this attempt began; None: the state is not loaded yet."""
    done: int | None = None
    """Optimizer steps done by now."""
    committed: int = 0
    """The newest step that this rank knows to be committed."""
    limit: int | None = None
    """Steps beyond which this rank does not train before it gets `Directive.stop_at`; None: it has not promised anything."""
    notice: str | None = None
    """Why this process is to end soon, if it was told so."""
    has_left: bool = False
    """Whether it has left early, everything committed."""
    has_ended: bool = False
    """Whether nothing more is to be expected from it: it has left, finished or failed."""


@dataclass(frozen=True)
class Directive:
    """What a rank is told."""

    is_asked: bool = False
    """Promise a limit."""
    stop_at: int | None = None
    """Commit the state after so many steps, and leave."""


@dataclass(frozen=True)
class GroupAttempt:
    """One time that the group was started, from its start to its end."""

    number: int
    workers: int
    first_step: int | None
    """Steps that were done when it began; None: it ended before it had loaded any state."""
    reached: int | None
    """Steps done when it was last heard of."""
    committed: int
    reason: str
    """Why it ended, if it did."""


class RankRegistry:
    """The ranks of the attempt that goes on, and the attempts before it. Every method may be called from any thread.

    Args:
        clock: seconds, from any beginning; passed in by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._number = 0
        self._places: list[str] = []
        self._heartbeats: dict[int, Heartbeat] = {}
        self._heard: dict[int, float] = {}
        self._stop_at: int | None = None
        self._asked: str | None = None
        self._final: str | None = None
        self._past: list[GroupAttempt] = []

    def begin(self, places: Sequence[str]) -> int:
        """Begins an attempt; returns its number, from 1.

        Args:
            places: where each rank runs, for messages.
        """
        with self._lock:
            self._number += 1
            self._places = list(places)
            self._heartbeats, self._stop_at, self._asked = {}, None, self._final
            now = self._clock()
            self._heard = dict.fromkeys(range(len(places)), now)
            return self._number

    def end(self, reason: str) -> None:
        """Notes the end of the attempt that goes on; does nothing if there is none."""
        with self._lock:
            if not self._places:
                return
            heartbeats = self._heartbeats.values()
            self._past.append(
                GroupAttempt(
                    number=self._number,
                    workers=len(self._places),
                    first_step=next(
                        (heartbeat.first_step for heartbeat in heartbeats if heartbeat.first_step is not None), None
                    ),
                    reached=max(
                        (heartbeat.done for heartbeat in heartbeats if heartbeat.done is not None), default=None
                    ),
                    committed=max((heartbeat.committed for heartbeat in heartbeats), default=0),
                    reason=reason,
                )
            )
            self._places, self._heartbeats, self._heard = [], {}, {}
            self._asked = self._final

    def heartbeat(self, heartbeat: Heartbeat) -> Directive:
        """Takes what a rank says; one of an attempt that is over is told nothing."""
        with self._lock:
            if heartbeat.attempt != self._number or heartbeat.rank not in self._heard:
                return Directive()
            self._heard[heartbeat.rank] = self._clock()
            self._heartbeats[heartbeat.rank] = heartbeat
            if heartbeat.notice is not None:
                self._asked = self._asked or f"rank {heartbeat.rank} {heartbeat.notice}"
            if self._asked is None:
                return Directive()
            limits = [known.limit for known in self._heartbeats.values() if known.limit is not None]
            if self._stop_at is None and len(limits) == len(self._places):
                self._stop_at = max(limits)
            return Directive(is_asked=True, stop_at=self._stop_at)

    def ask(self, reason: str, *, is_final: bool = False) -> None:
        """Asks all ranks to commit what they have and to leave; the first reason counts.

        Args:
            reason: why, for people.
            is_final: the run is to end with that, instead of going on with other workers.
        """
        with self._lock:
            self._asked = self._asked or reason
            if is_final:
                self._final = self._final or reason

    @property
    def asked(self) -> str | None:
        """Why the ranks are to leave, if they are."""
        with self._lock:
            return self._asked

    @property
    def final(self) -> str | None:
        """Why the run is to end, if it is."""
        with self._lock:
            return self._final

    @property
    def has_left(self) -> bool:
        """Whether every rank has left early, everything committed."""
        with self._lock:
            return bool(self._places) and all(
                rank in self._heartbeats and self._heartbeats[rank].has_left for rank in range(len(self._places))
            )

    @property
    def committed(self) -> int:
        """The newest step that any rank of any attempt has known to be committed."""
        with self._lock:
            known = [heartbeat.committed for heartbeat in self._heartbeats.values()] + [
                attempt.committed for attempt in self._past
            ]
            return max(known, default=0)

    @property
    def past(self) -> tuple[GroupAttempt, ...]:
        """The attempts that are over, oldest first."""
        with self._lock:
            return tuple(self._past)

    def joined(self) -> None:
        """All ranks have joined their group: how long that took is no silence of theirs."""
        with self._lock:
            self._heard = dict.fromkeys(self._heard, self._clock())

    def silent(self, limit_s: float, first_s: float) -> dict[int, str]:
        """Ranks of which nothing was heard for so long although they should be there, and what is known of them.

        Args:
            limit_s: longest time between two heartbeats.
            first_s: longest time until the first one, before which a rank imports what it needs.
        """
        with self._lock:
            now = self._clock()
            return {
                rank: f"silent for {now - heard:.0f} s; {self._describe(rank)}"
                for rank, heard in self._heard.items()
                if now - heard > (limit_s if rank in self._heartbeats else first_s)
                and not (rank in self._heartbeats and self._heartbeats[rank].has_ended)
            }

    def describe(self, rank: int) -> str:
        """Where a rank runs and how far it was when last heard of."""
        with self._lock:
            return self._describe(rank)

    def _describe(self, rank: int) -> str:
        place = self._places[rank] if rank < len(self._places) else "unknown place"
        heartbeat = self._heartbeats.get(rank)
        if heartbeat is None:
            return f"{place}, never heard of"
        return f"{place}, {'before its first step' if heartbeat.done is None else f'after step {heartbeat.done}'}"
