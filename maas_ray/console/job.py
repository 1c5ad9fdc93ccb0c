"""Shared code of the scripts for `ray job submit`: options, connection to the cluster, output and errors."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maas_ray.cluster import connect
from maas_ray.console.leaving import leaves, say_left, take_over
from maas_ray.display import masked, shown
from maas_ray.errors import MaasError, Preempted, SpecError
from maas_ray.process import interrupts


@dataclass(frozen=True)
class Asked:
    """The command line of a job."""

    spec: str
    """The YAML file."""
    overrides: list[str]
    """`a.b=c`."""
    resume: bool
    extend: dict[str, int] | None = None
    """A larger length of an existing run, such as `{"epochs": 8}`."""


def answer_job(
    description: str, kind: str, work: Callable[[Asked], tuple[Any, int]], *, can_extend: bool = False
) -> int:
    """Runs a job on the cluster that it was submitted to.

    Args:
        description: description of the script, for --help.
        kind: type of its spec, such as `TrainSpec`.
        work: called once Ray is connected; returns the document, printed as one JSON line on stdout, and the exit code.
        can_extend: whether the script has the option --extend.

    Returns:
        The exit code; 1 after an error of this library, which is printed as one line on stderr.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help=f"YAML file with a {kind}")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="overrides one field of the spec")
    parser.add_argument("--resume", action="store_true", help="continue the existing run or search of this name")
    if can_extend:
        help_text = "continue the existing run, also a finished one, to this larger total length"
        parser.add_argument("--extend", metavar="epochs=N|steps=N", help=help_text)
    arguments = parser.parse_args()
    leaves("committed work is kept: submit the job again with --resume, or without it if nothing was started")
    try:
        extend = getattr(arguments, "extend", None)
        asked = Asked(arguments.spec, arguments.set, arguments.resume, None if extend is None else read_length(extend))
        connect()
        document, exit_code = work(asked)
    except MaasError as error:
        return refuse(error)
    sys.stdout.write(f"{json.dumps(masked(document))}\n")
    return exit_code


def read_length(text: str) -> dict[str, int]:
    """Reads the value of --extend. Raises `SpecError` if it is not `epochs=N` or `steps=N`."""
    unit, _, number = text.partition("=")
    if unit not in ("epochs", "steps") or not number.isdecimal():
        raise SpecError(f"--extend {text!r} is not a length such as epochs=8 or steps=4000")
    return {unit: int(number)}


def run_job(main: Callable[[], int]) -> int:
    """Runs the main function of a script; a terminating signal ends it in order, with one line on stderr.

    Args:
        main: returns the exit code.

    Returns:
        The exit code; after an interruption the one that shells expect (143 for SIGTERM, which `ray job stop` sends).
    """
    try:
        take_over()
        return main()
    except KeyboardInterrupt:
        return say_left()


def refuse(error: MaasError) -> int:
    """Prints an error as one line on stderr, without Ray's traceback if a task raised it; returns the exit code."""
    cause = getattr(error, "cause", error)
    sys.stderr.write(f"error[{cause.code}]: {shown(str(cause))}\n")
    number = interrupts.last() if isinstance(cause, Preempted) else None
    return 1 if number is None else interrupts.exit_code(number)
