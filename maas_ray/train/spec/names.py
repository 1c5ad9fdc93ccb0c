"""Names of losses, metrics, optimizers and schedules: built-in ones, and import paths of a user's own."""

import re
from collections.abc import Sequence

from maas_ray.suggestions import did_you_mean

_IMPORT_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(name: str) -> bool:
    """Whether a name is an import path `package.module:name`."""
    return _IMPORT_PATH.fullmatch(name) is not None


def check_name(kind: str, name: str, known: Sequence[str]) -> None:
    """Refuses a name that is neither built in nor an import path.

    Args:
        kind: the kind of thing, in the singular, such as `loss`.
        name: the name in the spec.
        known: the built-in names.

    Raises:
        ValueError: with the nearest built-in name.
    """
    if name not in known and not is_import_path(name):
        hint = did_you_mean(name, known, f"built-in names: {', '.join(known) or 'none'}")
        raise ValueError(f"unknown {kind} {name!r}; {hint} (or an import path 'package.module:name')")
