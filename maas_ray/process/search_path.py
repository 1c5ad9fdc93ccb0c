"""Where Python looks for modules: installed ones first, the user's last. Imports nothing that could be looked for.

`python -m` puts the working directory first, and Ray does so in all of its workers: in a folder with an `onnx.py` beside
a downloaded model, that file would run instead of the library. So the working directory is left out, and appended where
a command builds models that specs name by import path (`model: {name: my_nets:Net}`).
"""

import os
import sys


def leave_out_working_directory() -> None:
    """Takes the working directory away from where `python -m` and empty entries of PYTHONPATH have put it."""
    here = os.path.realpath(os.curdir)
    sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]


def append(directory: str) -> None:
    """Has modules looked for in a directory, after everything that is installed."""
    if os.path.realpath(directory) not in map(os.path.realpath, sys.path):
        sys.path.append(directory)


def of_workers(extra: str | None = None) -> list[str]:
    """What Ray is to insert in front of the paths of its workers, one after the other: so the last one comes first.

    Workers then look where their driver looks, in the same order.

    Args:
        extra: one more directory, looked into last.
    """
    entries = [os.path.abspath(entry) for entry in sys.path if os.path.isdir(entry or os.curdir)]
    if extra is not None and extra not in entries:
        entries.append(extra)
    return list(dict.fromkeys(entries))[::-1]
