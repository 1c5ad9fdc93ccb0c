"""Moves replicas of a spread pool to nodes that returned: starts new ones, then ends as many on the fullest nodes.

A pool has more replicas than its wanted number while it moves, and never fewer.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maas_ray.ray_internals.serve_controller import DeploymentState

SETTLE_S = 3.0
"""Seconds for which a pool must have been uneven: a joining node registers its resources and labels in steps."""
LOOK_S = 1.0
"""Seconds between two checks of a pool that does not move."""
START_S = 300.0
"""Maximum seconds for replicas to start elsewhere; then the move is aborted."""
BACKOFF_S = (30.0, 120.0, 600.0)
"""Pauses after moves that left the pool as uneven as before."""


@dataclass
class Mover:
    """Computes the number of additional replicas of a pool during a move. Independent of Serve.

    Args:
        clock: returns seconds, from any origin; passed in by tests.
    """

    clock: Callable[[], float] = time.monotonic
    extra: int = 0
    """Current number of replicas beyond the pool's wanted number."""
    _since: float | None = None
    _not_before: float = 0.0
    _deadline: float = 0.0
    _version: Any = None
    _last_moves: int = 0
    _num_vain: int = 0

    def rest(self, version: Any, moves: Callable[[], int]) -> None:
        """Checks a pool whose replicas all run; starts a move if it has been uneven for some time.

        Args:
            version: wanted version of the pool; a move ends when it changes.
            moves: returns how many replicas should move.
        """
        now = self.clock()
        if now < self._not_before:
            return
        self._not_before = now + LOOK_S
        wanted = moves()
        if not wanted:
            self._since, self._num_vain, self._last_moves = None, 0, 0
            return
        if self._last_moves and wanted >= self._last_moves:
            self._not_before = now + BACKOFF_S[min(self._num_vain, len(BACKOFF_S) - 1)]
            self._num_vain, self._last_moves = self._num_vain + 1, 0
            return
        if self._since is None:
            self._since = now
        if now - self._since >= SETTLE_S:
            self.extra, self._version, self._deadline = wanted, version, now + START_S
            self._last_moves, self._since = wanted, None

    def follow(self, version: Any, num_running: int, num_wanted: int) -> None:
        """Checks a moving pool; ends the move once the new replicas run, or the wanted state has changed."""
        arrived = num_running >= num_wanted + self.extra
        if self.extra and (arrived or version != self._version or self.clock() > self._deadline):
            self.extra = 0


class PoolState(DeploymentState):  # type: ignore[misc]
    """Serve's state of one deployment, extended by moves."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        self._in_transition = True
        super().__init__(*parts, **options)
        self._mover = Mover()

    def scale_deployment_replicas(self, *parts: Any, **options: Any) -> Any:
        """Called by Serve's controller ten times a second, for each deployment."""
        target = self._target_state
        what = (target.version, target.target_num_replicas, target.deleting)
        if self._mover.extra:
            self._mover.follow(what, self.get_num_running_replicas(), target.target_num_replicas)
        elif not self._in_transition and not target.deleting:
            self._mover.rest(what, lambda: self._deployment_scheduler.moves_of(self._id))
            self._in_transition = self._mover.extra > 0
        return super().scale_deployment_replicas(*parts, **options)

    def _get_target_replica_delta(self) -> int:
        return int(super()._get_target_replica_delta()) + self._mover.extra
