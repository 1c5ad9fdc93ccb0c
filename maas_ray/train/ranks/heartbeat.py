"""The heartbeat thread of a rank: sends its state once a second and receives directives. Independent of Ray and torch.

train/ranks/rank_registry.py describes how all ranks leave after the same step. A step costs one uncontended lock.
"""

import math
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from maas_ray.display import get_logger
from maas_ray.errors import RanksMissing
from maas_ray.train.ranks.rank_registry import Directive, Heartbeat

HEARTBEAT_S = 1.0
"""Interval of heartbeats."""
QUICK_S = 0.1
"""Interval of heartbeats while the ranks agree on a step."""

log = get_logger(__name__)


class Pace:
    """Sends this rank's heartbeats until it is closed.

    Args:
        send: sends a heartbeat and returns the directive; if it raises, the next heartbeat is a retry.
        attempt: number of the attempt.
        rank: rank of this process.
        notice: returns why this process must end soon, or None.
        patience_s: timeout for the other ranks at the promised limit of this rank.
    """

    def __init__(
        self,
        send: Callable[[Heartbeat], Directive],
        attempt: int,
        rank: int,
        *,
        notice: Callable[[], str | None] = lambda: None,
        patience_s: float = 60.0,
    ) -> None:
        self._send = send
        self._notice = notice
        self._patience_s = patience_s
        self._state = Heartbeat(attempt, rank)
        self._stop_at: int | None = None
        self._changed = threading.Condition()
        self._is_closed = False
        self._seen: tuple[float, int] | None = None
        self._thread = threading.Thread(target=self._run, name="pace", daemon=True)
        self._thread.start()

    def begin(self, first_step: int) -> None:
        """Records that the state after `first_step` steps is loaded and that training starts."""
        with self._changed:
            self._state = replace(self._state, first_step=first_step, done=first_step)
            self._seen = (time.monotonic(), first_step)

    def is_stop(self, done: int) -> bool:
        """Records that `done` steps are done; returns whether to commit the state after them and leave.

        Raises:
            RanksMissing: the ranks must leave, but did not agree on a step within the timeout.
        """
        with self._changed:
            self._state = replace(self._state, done=done)
            limit = self._state.limit
            if limit is None or done < limit:
                return False
            if not self._changed.wait_for(lambda: self._stop_at is not None or self._is_closed, self._patience_s):
                raise RanksMissing(
                    f"rank {self._state.rank} waited {self._patience_s:g} s after step {done} for the common last "
                    "step; another rank or the run's actor does not answer"
                )
            return self._stop_at == done

    def committed(self, step: int) -> None:
        """Records a committed checkpoint."""
        with self._changed:
            self._state = replace(self._state, committed=max(step, self._state.committed))

    def close(self, *, has_left: bool = False, timeout_s: float = 10.0) -> None:
        """Sends the last heartbeat and ends the thread.

        Args:
            has_left: whether this rank leaves early, with everything committed.
            timeout_s: timeout for the last heartbeat.
        """
        with self._changed:
            self._state = replace(self._state, has_left=has_left, has_ended=True)
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join(timeout=timeout_s)

    def _run(self) -> None:
        while True:
            with self._changed:
                is_last = self._is_closed
                said = self._state = replace(self._state, notice=self._notice())
            try:
                directive = self._send(said)
            except Exception as error:  # the actor is busy or dead; if dead, this process ends with it
                log.debug("heartbeat of rank %d failed: %s", said.rank, error)
                directive = Directive()
            if is_last:
                return
            with self._changed:
                wait_s = self._obey(directive)
                self._changed.wait_for(lambda: self._is_closed, wait_s)

    def _obey(self, directive: Directive) -> float:
        """Follows a directive; returns the seconds until the next heartbeat."""
        if directive.stop_at is not None and self._stop_at is None:
            self._stop_at = directive.stop_at
            self._changed.notify_all()
        if self._stop_at is not None:
            return HEARTBEAT_S
        done = self._state.done
        if directive.is_asked and self._state.limit is None and done is not None:
            self._state = replace(self._state, limit=done + self._margin(done))
            return 0.0
        if self._state.limit is not None:
            return QUICK_S
        if done is not None:
            self._seen = (time.monotonic(), done)
        return HEARTBEAT_S

    def _margin(self, done: int) -> int:
        """Number of steps until all ranks have promised a limit and received the step; with fewer, ranks would wait."""
        if self._seen is None:
            return 1
        seen_s, seen = self._seen
        rate = (done - seen) / max(time.monotonic() - seen_s, 1e-3)
        return 1 + math.ceil(rate * 1.5 * HEARTBEAT_S)
