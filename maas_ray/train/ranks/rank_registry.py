"""The registry of a run's ranks: their heartbeats and progress, and the step after which all of them leave.

Ranks send a `Heartbeat` about once a second, from a separate thread (train/ranks/heartbeat.py), and receive a
`Directive`. Independent of Ray and torch; the clock is an argument.

All ranks leave after the same step without messages between them in each step: after a request to leave, each rank
answers with a limit slightly ahead of its current step, and does not train beyond the limit without a directive. Once
all limits are known, the largest is the last step. No rank has passed its own limit, so that none has passed that step;
and all ranks receive it, because a rank at its limit waits. Clocks, speeds and the order of messages do not affect the
result; they only determine whether a rank waits for a moment.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heartbeat:
    """The state of one rank."""

    attempt: int
    rank: int
    first_step: int | None = None
    """Completed steps at the start of this attempt; None: the state is not loaded yet."""
    done: int | None = None
    """Completed optimizer steps."""
    committed: int = 0
    """The newest committed step known to this rank."""
    limit: int | None = None
    """The step beyond which this rank does not train without `Directive.stop_at`; None: no limit is promised."""
    notice: str | None = None
    """The reason why this process must end soon, or None."""
    has_left: bool = False
    """Whether the rank has left early, with everything committed."""
    has_ended: bool = False
    """Whether this is the last heartbeat: the rank has left, finished or failed."""


@dataclass(frozen=True)
class Directive:
    """The answer to a heartbeat."""

    is_asked: bool = False
    """Whether the rank must promise a limit."""
    stop_at: int | None = None
    """The step after which the rank must commit its state and leave."""


@dataclass(frozen=True)
class GroupAttempt:
    """One attempt, from the start of the group to its end."""

    number: int
    workers: int
    first_step: int | None
    """Completed steps at its start; None: it ended before it had loaded a state."""
    reached: int | None
    """Completed steps in the last heartbeat."""
    committed: int
    reason: str
    """The reason of its end."""


class RankRegistry:
    """The ranks of the current attempt, and the earlier attempts. Every method is thread-safe.

    Args:
        clock: returns seconds from any origin; set by tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._number = 0
        self._places: list[str] = []
        self._heartbeats: dict[int, Heartbeat] = {}
        self._last_heartbeat_s: dict[int, float] = {}
        self._stop_at: int | None = None
        self._asked: str | None = None
        self._final: str | None = None
        self._past: list[GroupAttempt] = []

    def begin(self, places: Sequence[str]) -> int:
        """Starts an attempt; returns its number, from 1.

        Args:
            places: location of each rank, for messages.
        """
        with self._lock:
            self._number += 1
            self._places = list(places)
            self._heartbeats, self._stop_at, self._asked = {}, None, self._final
            now = self._clock()
            self._last_heartbeat_s = dict.fromkeys(range(len(places)), now)
            return self._number

    def end(self, reason: str) -> None:
        """Records the end of the current attempt, if any."""
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
            self._places, self._heartbeats, self._last_heartbeat_s = [], {}, {}
            self._asked = self._final

    def heartbeat(self, heartbeat: Heartbeat) -> Directive:
        """Records a heartbeat and returns the directive; a heartbeat of an earlier attempt is ignored."""
        with self._lock:
            if heartbeat.attempt != self._number or heartbeat.rank not in self._last_heartbeat_s:
                return Directive()
            self._last_heartbeat_s[heartbeat.rank] = self._clock()
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
        """Asks all ranks to commit a checkpoint and leave; the first reason is kept.

        Args:
            reason: the reason, for messages.
            is_final: whether the run then ends, instead of continuing with other workers.
        """
        with self._lock:
            self._asked = self._asked or reason
            if is_final:
                self._final = self._final or reason

    @property
    def asked(self) -> str | None:
        """The reason why the ranks must leave, or None."""
        with self._lock:
            return self._asked

    @property
    def final(self) -> str | None:
        """The reason why the run must end, or None."""
        with self._lock:
            return self._final

    @property
    def has_left(self) -> bool:
        """Whether every rank has left early, with everything committed."""
        with self._lock:
            return bool(self._places) and all(
                rank in self._heartbeats and self._heartbeats[rank].has_left for rank in range(len(self._places))
            )

    @property
    def committed(self) -> int:
        """The newest committed step known to any rank of any attempt."""
        with self._lock:
            known = [heartbeat.committed for heartbeat in self._heartbeats.values()] + [
                attempt.committed for attempt in self._past
            ]
            return max(known, default=0)

    @property
    def past(self) -> tuple[GroupAttempt, ...]:
        """The ended attempts, oldest first."""
        with self._lock:
            return tuple(self._past)

    def joined(self) -> None:
        """Resets the heartbeat timeouts once all ranks have joined their group: joining does not count as silence."""
        with self._lock:
            self._last_heartbeat_s = dict.fromkeys(self._last_heartbeat_s, self._clock())

    def silent(self, limit_s: float, first_s: float) -> dict[int, str]:
        """Running ranks whose heartbeat timed out, each with a description.

        Args:
            limit_s: timeout between two heartbeats.
            first_s: timeout of the first heartbeat, before which a rank imports its modules.
        """
        with self._lock:
            now = self._clock()
            return {
                rank: f"no heartbeat for {now - last_s:.0f} s; {self._describe(rank)}"
                for rank, last_s in self._last_heartbeat_s.items()
                if now - last_s > (limit_s if rank in self._heartbeats else first_s)
                and not (rank in self._heartbeats and self._heartbeats[rank].has_ended)
            }

    def describe(self, rank: int) -> str:
        """The location of a rank and its progress in the last heartbeat."""
        with self._lock:
            return self._describe(rank)

    def _describe(self, rank: int) -> str:
        place = self._places[rank] if rank < len(self._places) else "unknown place"
        heartbeat = self._heartbeats.get(rank)
        if heartbeat is None:
            return f"{place}, no heartbeat yet"
        return f"{place}, {'before its first step' if heartbeat.done is None else f'after step {heartbeat.done}'}"
