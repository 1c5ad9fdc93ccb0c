"""The module search path of Python: installed modules first, the user's last. Imports only the standard library.

`python -m` and Ray's workers search the working directory first: in a directory with an `onnx.py` next to a downloaded
model, that file would run instead of the library. Therefore the working directory is removed, and appended only for
commands that build models which specs name by import path (`model: {name: my_nets:Net}`).
"""

import os
import sys


def leave_out_working_directory() -> None:
    """Removes the working directory, which `python -m` and empty entries of PYTHONPATH add to the search path."""
    here = os.path.realpath(os.curdir)
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]


def append(directory: str) -> None:
    """Appends a directory to the search path, after all installed modules."""
    if os.path.realpath(directory) not in map(os.path.realpath, sys.path):
        sys.path.append(directory)


def of_workers(extra: str | None = None) -> list[str]:
    """The directories that Ray inserts at the front of its workers' search paths, one by one: the last one ends first.

    The workers then have the search path of their driver.

    Args:
        extra: a further directory, searched last.
    """
    entries = [os.path.abspath(entry) for entry in sys.path if os.path.isdir(entry or os.curdir)]
    if extra is not None and extra not in entries:
        entries.append(extra)
    return list(dict.fromkeys(entries))[::-1]
