"""Collects what is wrong with several columns of a data set, so that one attempt names all of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from maas_ray.errors import DataError

MAX_NAMED = 20


class Refusals:
    """The refusals of columns so far."""

    def __init__(self) -> None:
        self._errors: list[DataError] = []

    @contextmanager
    def collect(self) -> Iterator[None]:
        """Keeps a `DataError` of the block for `refuse`."""
        try:
            yield
        except DataError as error:
            self._errors.append(error)

    def refuse(self) -> None:
        """Raises what was collected.

        Raises:
            DataError: the only one, or one with the messages of at most `MAX_NAMED`.
        """
        if len(self._errors) == 1:
            raise self._errors[0]
        if self._errors:
            listed = "; ".join(f"({number}) {error}" for number, error in enumerate(self._errors[:MAX_NAMED], start=1))
            more = len(self._errors) - MAX_NAMED
            raise DataError(
                f"{len(self._errors)} columns need a decision: {listed}" + (f"; and {more} more" if more > 0 else "")
            )
