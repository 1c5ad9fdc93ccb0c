"""Inline rule: selects the runs that execute on the event loop itself, namely those that are known to be short.

never        the run time depends on values (loops, sizes computed from values), or a version is not proven safe to
             run in this process
not yet      a size that was not measured; if more than the number of rows varies, that exact shape
not now      after a run that took long although it was expected to be short, until a thousand consecutive runs in
             the engine's thread were short; ten times as many each time that it happens again
"""

import math
from collections.abc import Hashable

from maas_ray.bundle.loading import AnyEngine
from maas_ray.display import get_logger
from maas_ray.serve.batching.item import Tensors

log = get_logger(__name__)

INLINE_BELOW_S = 300e-6
"""A run shorter than this is not worth a hop to a thread and back: 12 to 25 microseconds measured on uvloop, all of
which a lone request pays. With 32 and 128 clients neither way had the better tail for runs of up to 400 microseconds
(the loop's own work on those requests takes longer); a much longer run would keep the loop from reading."""
SLOW_S = 2e-3
"""A run on the loop that takes longer was not as short as expected, or the machine was busy: the run is repeated in the
engine's thread, and its processor time decides between the two."""
RUNS_OFF = 1000
"""Consecutive short runs in the thread after which a version may run on the loop again."""

_DRIFT = 1.01
"""Factor by which the fastest known time grows with each later run, so that a model that became slower is noticed."""
_MAX_SHAPES = 1024
"""Maximum number of shapes with a remembered fastest run; clients choose the shapes."""


class InlineRule:
    """The rule of one engine; every run is reported to it.

    Args:
        engine: engine of the runs.
        below_s: expected seconds below which a run executes on the loop.
    """

    def __init__(self, engine: AnyEngine, below_s: float = INLINE_BELOW_S) -> None:
        self._engine = engine
        self._below_s = below_s
        self.slow_s = max(SLOW_S, below_s)
        """A run on the loop that takes longer is suspect."""
        self._goes_by_rows = engine.can_merge and not engine.has_free_sizes
        self._shortest: dict[Hashable, float] = {}
        """Seconds of the fastest run by the power of two of its rows, or by its shape if that is more specific."""
        self._is_never = not engine.is_bounded
        self._is_suspect = False
        self._num_off = 0
        """Short runs in the thread that are still needed before a run may execute on the loop."""
        self._next_off = RUNS_OFF
        self._is_blocked = self._is_never

    def is_short(self, inputs: Tensors, num_rows: int) -> bool:
        """Whether a run is known to be short enough for the loop."""
        if self._is_blocked:
            return False
        # Not by the mean: in a thread a run also waits for the interpreter's lock when it returns, so on a busy
        # machine the mean of short runs would grow until all of them used the thread, permanently.
        if not self._goes_by_rows:
            return self._shortest.get(_shape_of(inputs), math.inf) < self._below_s
        fastest_s = self._shortest.get(num_rows.bit_length())
        if fastest_s is None:  # measured by the warm-up, if at all
            latency = self._engine.latency
            return latency.has_measured(num_rows) and latency.estimate_s(num_rows) < self._below_s
        return fastest_s < self._below_s

    def note(self, inputs: Tensors, num_rows: int, run_s: float) -> None:
        """Records the time of a run; called from any thread."""
        key = num_rows.bit_length() if self._goes_by_rows else _shape_of(inputs)
        fastest_s = self._shortest.get(key)
        if fastest_s is None:
            if len(self._shortest) >= _MAX_SHAPES:
                self._shortest.clear()
            self._shortest[key] = run_s
        else:
            fastest_s *= _DRIFT
            self._shortest[key] = run_s if run_s < fastest_s else fastest_s

    @property
    def is_off(self) -> bool:
        """Whether the time of each run must be passed to `note_spent`."""
        return self._num_off > 0

    def suspect(self) -> bool:
        """Records that a run on the loop took longer than `slow_s`; none executes there until `judge` has the cause.

        Returns:
            Whether the run must be repeated to find the cause; False if one is being repeated already.
        """
        is_first = not self._is_suspect
        self._is_suspect = self._is_blocked = True
        return is_first

    def judge(self, spent_s: float) -> None:
        """Records the repetition of a suspect run in a thread.

        Args:
            spent_s: time that the run itself used, without other work of the machine.
        """
        self._is_suspect = False
        if spent_s > self.slow_s:
            self._num_off, self._next_off = self._next_off, 10 * self._next_off
            log.warning(
                "a run on the loop took %.1f ms although it was expected to be short: runs of this version use the "
                "engine's thread until %d consecutive ones were short", 1e3 * spent_s, self._num_off,
            )  # fmt: skip
        self._block()

    def note_spent(self, spent_s: float) -> None:
        """Records that a run in the thread used `spent_s` seconds."""
        self._num_off = self._num_off - 1 if spent_s <= self.slow_s else self._next_off // 10
        self._block()

    def _block(self) -> None:
        self._is_blocked = self._is_never or self._is_suspect or self._num_off > 0


def _shape_of(inputs: Tensors) -> Hashable:
    return tuple([array.shape for array in inputs.values()])
