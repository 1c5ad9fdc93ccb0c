"""The nearest right name, for messages about a name that nobody knows. Knows no error."""

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that `name` was most likely meant to be; None if none is near.

    Args:
        name: as it was given.
        known: the right ones.
        cutoff: how alike they have to be, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint: the nearest known name, or `otherwise` if none is near."""
    near = nearest(name, known)
    return otherwise if near is None else f"did you mean {near!r}?"
