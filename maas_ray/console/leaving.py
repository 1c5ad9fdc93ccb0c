"""The line that an interrupted command prints: the state it leaves and the next step. Each command keeps it current."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable

from maas_ray.display import shown
from maas_ray.process import interrupts

_NOTHING = "nothing was changed; run the command again"
_left: str | Callable[[], str] = _NOTHING
_has_said = False


def leaves(text: str | Callable[[], str]) -> None:
    """Sets the line for an interruption from here on: the state it leaves and how to continue.

    Args:
        text: one line, or a function that returns it at the interruption and must not block.
    """
    global _left
    _left = text


def published(model: str, version: int, alias: str | None) -> str:
    """The line for an interruption after a version was published.

    Args:
        model: name of the model.
        version: number of the version.
        alias: requested alias that does not point at the version yet.
    """
    then = (
        f"its alias was not moved: maas-ray promote {model} {version} --alias {alias}"
        if alias
        else "no further step is needed"
    )
    return f"{model} version {version} was published; {then}"


def has_said() -> bool:
    """Whether `say_left` was called."""
    return _has_said


def take_over() -> None:
    """Makes this program end in order, with one line on stderr, on a terminating signal."""
    interrupts.take_over(_end_stuck)


def say_left() -> int:
    """Writes the line of an interrupted command to stderr; returns the exit code that shells expect.

    A further signal ends the process immediately.
    """
    number = interrupts.last() or signal.SIGINT
    interrupts.let_go()
    return _say(number, "")


def _end_stuck(number: signal.Signals) -> None:
    """Ends the process like a kill, called outside of the main thread: uncommitted work is lost."""
    os._exit(_say(number, f" (the program did not respond and was ended after {interrupts.STUCK_S:g} s)"))


def _say(number: signal.Signals, remark: str) -> int:
    global _has_said
    _has_said = True
    try:
        text = _left if isinstance(_left, str) else _left()
    except Exception as failure:  # the line is printed in any case
        text = f"the remaining state is unknown ({type(failure).__name__})"
    with contextlib.suppress(OSError):  # the terminal may be closed
        sys.stderr.write(f"\ninterrupted[{number.name}]: {shown(text)}{remark}\n")
        sys.stderr.flush()
    return interrupts.exit_code(number)


def end_at_closed_pipe() -> int:
    """Handles a closed stdout (`maas-ray models | head -1`); returns the exit code that shells expect."""
    with contextlib.suppress(OSError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # Python flushes its remaining buffer there at exit
    return interrupts.exit_code(signal.SIGPIPE)
