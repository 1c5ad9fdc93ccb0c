"""The nearest right name, for messages about a name that nobody knows. Knows no error."""

import difflib
from collections.abc import Iterable, Sequence

MAX_LISTED = 10
"""Names that a message lists; of more it says how many there are."""
MAX_COMPARED = 1000
"""Names that are compared with a wrong one: with 10,000 that would take a second."""


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


def known_names(name: str, known: Sequence[str], kinds: str, command: str = "") -> str:
    """The end of a message about a name that does not exist: the nearest names, and which or how many there are.

    Args:
        name: as it was given.
        known: the right ones, in the order in which they are listed.
        kinds: what they are, in the plural.
        command: that lists all of them.
    """
    if not known:
        return f"there are no {kinds} yet"
    compared = known if len(known) <= MAX_COMPARED else [one for one in known if one[:1] == name[:1]][:MAX_COMPARED]
    near = difflib.get_close_matches(name, compared, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if len(known) <= MAX_LISTED:
        return f"{hint}{kinds}: {', '.join(known)}"
    return f"{hint}there are {len(known)} {kinds}" + (f", which `{command}` lists" if command else "")
