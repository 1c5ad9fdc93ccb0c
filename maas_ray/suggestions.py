"""Suggests the nearest existing names for messages about an unknown name. Independent of error classes."""

import difflib
from collections.abc import Iterable, Sequence

MAX_LISTED = 10
"""Largest number of names that a message lists; beyond it only their number is given."""
MAX_COMPARED = 1000
"""Largest number of names that are compared with an unknown one: 10,000 would take a second."""


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is most similar to `name`; None if none is similar enough.

    Args:
        name: the unknown name.
        known: the existing names.
        cutoff: smallest similarity, from 0 to 1.
    """
    return next(iter(difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)), None)


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """A hint with the nearest known name, or `otherwise` if none is similar."""
    near = nearest(name, known)
    return otherwise if near is None else f"did you mean {near!r}?"


def known_names(name: str, known: Sequence[str], kinds: str, command: str = "") -> str:
    """The end of a message about an unknown name: the nearest names, and the list or the number of all names.

    Args:
        name: the unknown name.
        known: the existing names, in the order of the list.
        kinds: their kind, in the plural, such as `models`.
        command: command that lists all of them.
    """
    if not known:
        return f"there are no {kinds} yet"
    compared = known if len(known) <= MAX_COMPARED else [one for one in known if one[:1] == name[:1]][:MAX_COMPARED]
    near = difflib.get_close_matches(name, compared, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
    if len(known) <= MAX_LISTED:
        return f"{hint}{kinds}: {', '.join(known)}"
    return f"{hint}there are {len(known)} {kinds}" + (f", which `{command}` lists" if command else "")
