"""A word to a run in progress that nobody waits for it any more. Knows no engine: whoever runs says what ends the run."""

from collections.abc import Callable


class StopSignal:
    """Said by one thread (`set`), heard by the one that runs (`tell`).

    Each side writes its own field before it reads the other's, so under the interpreter's lock none misses the other.
    """

    __slots__ = ("_end", "is_set")

    def __init__(self) -> None:
        self.is_set = False
        self._end: Callable[[], None] | None = None

    def set(self) -> None:
        """Nobody waits for the run. It ends at the next node of its graph, or before it has begun."""
        self.is_set = True
        end = self._end
        if end is not None:
            end()

    def tell(self, end: Callable[[], None]) -> None:
        """Says what ends the run; called at once if that is wanted already.

        Args:
            end: may be called from another thread, and more than once.
        """
        self._end = end
        if self.is_set:
            end()
