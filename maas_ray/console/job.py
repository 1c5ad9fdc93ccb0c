"""What the scripts for `ray job submit` share: the options of those that take a spec, the cluster, and how they answer."""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from maas_ray.cluster import connect
from maas_ray.console.leaving import leaves, say_left, take_over
from maas_ray.display import masked, shown
from maas_ray.errors import MaasError, Preempted
from maas_ray.process import interrupts


@dataclass(frozen=True)
class Asked:
    """The command line of a job."""

    spec: str
    """The YAML file."""
    overrides: list[str]
    """`a.b=c`."""
    resume: bool


def answer_job(description: str, kind: str, work: Callable[[Asked], tuple[Any, int]]) -> int:
    """Runs a job on the cluster that it was submitted to.

    Args:
        description: of the script, for --help.
        kind: of its spec: `TrainSpec`.
        work: called once Ray is connected; gives what is printed as one JSON line on stdout, and the exit code.

    Returns:
        The exit code; 1 for an error of this library, whose one line goes to stderr.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help=f"YAML file with a {kind}")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="overrides one field of the spec")
    parser.add_argument("--resume", action="store_true", help="go on with what exists under this name")
    arguments = parser.parse_args()
    leaves("what was committed is kept: submit the job again with --resume; if nothing was begun, without")
    try:
        connect()
        document, exit_code = work(Asked(arguments.spec, arguments.set, arguments.resume))
    except MaasError as error:
        return refuse(error)
    sys.stdout.write(f"{json.dumps(masked(document))}\n")
    return exit_code


def run_job(main: Callable[[], int]) -> int:
    """Runs the main function of a script; a signal that asks it to end ends it in order, and with one line.

    Args:
        main: returns the exit code.

    Returns:
        The exit code; for an interruption the one that shells expect (SIGTERM, of `ray job stop`: 143).
    """
    try:
        take_over()
        return main()
    except KeyboardInterrupt:
        return say_left()


def refuse(error: MaasError) -> int:
    """Says an error in one line on stderr; returns the exit code. One of a task comes with Ray's traceback around it."""
    cause = getattr(error, "cause", error)
    sys.stderr.write(f"error[{cause.code}]: {shown(str(cause))}\n")
    number = interrupts.last() if isinstance(cause, Preempted) else None
    return 1 if number is None else interrupts.exit_code(number)
