"""Where a run's time goes, by phase, summed over the attempts that led to its state. Knows no phase's meaning."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Counts from its creation on; always in one phase.

    Args:
        phase: the first one.
        clock: seconds; passed in by tests.
    """

    def __init__(self, phase: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase = phase
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def add(self, before: Mapping[str, float]) -> None:
        """Takes in what an earlier attempt has counted."""
        for phase, seconds in before.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def enter(self, phase: str) -> str:
        """Changes to a phase; returns the one before."""
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Another phase within the block, then the one before again."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase until now."""
        self.enter(self._phase)
        return dict(self._seconds)
