"""A signal to stop a run in progress that is no longer needed. The runner registers the action that stops it."""

from collections.abc import Callable


class StopSignal:
    """Set by one thread (`set`), received by the thread that runs (`tell`).

    Each side writes its own field before it reads the other's, so under the GIL neither side misses the other.
    """

    __slots__ = ("_end", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._end: Callable[[], None] | None = None

    def set(self) -> None:
        """Stops the run at the next node of its graph, or before it has started."""
        self.is_set = True
        end = self._end
        if end is not None:
            end()

    def tell(self, end: Callable[[], None]) -> None:
        """Registers the action that stops the run; calls it at once if the signal is already set.

        Args:
            end: may be called from another thread, and more than once.
        """
        self._end = end
        if self.is_set:
            end()
