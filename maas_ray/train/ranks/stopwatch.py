"""Measures the time of a run by phase, over all attempts that led to its state. Independent of the phases' meaning."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Stopwatch:
    """Measures from its creation on; always in one phase.

    Args:
        phase: the first phase.
        clock: returns seconds; set by tests.
    """

    def __init__(self, phase: str, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._phase = phase
        self._since = clock()
        self._seconds: dict[str, float] = {}

    def add(self, before: Mapping[str, float]) -> None:
        """Adds the times of an earlier attempt."""
        for phase, seconds in before.items():
            self._seconds[phase] = self._seconds.get(phase, 0.0) + seconds

    def enter(self, phase: str) -> str:
        """Changes the phase; returns the previous one."""
        now = self._clock()
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._since
        before, self._phase, self._since = self._phase, phase, now
        return before

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Changes the phase during the block."""
        before = self.enter(name)
        try:
            yield
        finally:
            self.enter(before)

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase so far."""
        self.enter(self._phase)
        return dict(self._seconds)
