"""What a command leaves behind when it is interrupted, in one line. Each command says it, and again when it changes."""

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
    """Says what an interruption from here on leaves, and how to continue.

    Args:
        text: one line; or what finds it out when it is asked, which must not wait for anybody.
    """
    global _left
    _left = text


def published(model: str, version: int, alias: str | None) -> str:
    """For a command that has published a version.

    Args:
        model: of which.
        version: its number.
        alias: one that does not point at it yet although it was asked for.
    """
    then = (
        f"its alias was not moved: maas-ray promote {model} {version} --alias {alias}"
        if alias
        else "nothing is left to do"
    )
    return f"{model} version {version} was published; {then}"


def has_said() -> bool:
    """Whether `say_left` was called."""
    return _has_said


def take_over() -> None:
    """Makes this program end in order, and with one line, when a signal asks it to."""
    interrupts.take_over(_end_stuck)


def say_left() -> int:
    """Writes the line of an interrupted command to stderr; returns the exit code that shells expect.

    From here on a further signal ends the process at once.
    """
    number = interrupts.last() or signal.SIGINT
    interrupts.let_go()
    return _say(number, "")


def _end_stuck(number: signal.Signals) -> None:
    """Ends the process from another thread than its main one, as a kill would: what is not committed is not there."""
    os._exit(_say(number, f" (it was waiting for an answer, and was ended after {interrupts.STUCK_S:g} s)"))


def _say(number: signal.Signals, remark: str) -> int:
    global _has_said
    _has_said = True
    try:
        text = _left if isinstance(_left, str) else _left()
    except Exception as failure:  # whatever it is, the line comes
        text = f"what was left is not known ({type(failure).__name__})"
    with contextlib.suppress(OSError):  # the terminal may be gone
        sys.stderr.write(f"\ninterrupted[{number.name}]: {shown(text)}{remark}\n")
        sys.stderr.flush()
    return interrupts.exit_code(number)


def end_at_closed_pipe() -> int:
    """For output that nobody reads any more (`maas-ray models | head -1`); returns the exit code that shells expect."""
    with contextlib.suppress(OSError):
        devnull = os.open(os.devnull, os.O_WRONLY)
        os.dup2(devnull, sys.stdout.fileno())  # what is still in Python's buffer goes there at the end
    return interrupts.exit_code(signal.SIGPIPE)
