"""Holds a piece of work to a bound of time and memory, in a process of its own, whatever it does."""

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tests.support.root import ROOT

WALL_S = 60
"""Generous: the machine may be busy with other things. The files would take many times as long, or never end."""
MEMORY_BYTES = 1 << 30
"""Above what the imports take."""

_CHILD = """
import json, os, resource, sys
from importlib import import_module
module, _, name = sys.argv[1].partition(":")
function = getattr(import_module(module), name)
function(json.loads(sys.argv[2]), True)
with open("/proc/self/statm") as file:
    base = int(file.read().split()[5]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_DATA, (base + int(sys.argv[3]), base + int(sys.argv[3])))
try:
    function(json.loads(sys.argv[2]), False)
except BaseException as error:
    print(json.dumps({"error": type(error).__name__, "text": str(error)}))
else:
    print(json.dumps({"error": "", "text": ""}))
sys.stdout.flush()
os._exit(0)  # without the exit messages of libraries' threads
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a piece of work."""

    error: str
    """Name of the error's class; empty: there was none."""
    text: str


def bounded(function: str, argument: Mapping[str, Any], memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Calls `function(argument, is_warm_up)` in a fresh process that has so much memory and time.

    Args:
        function: `module:name`; called twice, the first time to import what it needs, without a limit.
        argument: goes through JSON.
        memory_bytes: what the second call may take.

    Raises:
        AssertionError: it ran into the limit of time, or the process died.
    """
    command = [sys.executable, "-W", "ignore", "-c", _CHILD, function, json.dumps(argument), str(memory_bytes)]
    root = ROOT
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=WALL_S, cwd=root, check=False)
    except subprocess.TimeoutExpired as error:
        raise AssertionError(f"{argument} took longer than {WALL_S} s") from error
    assert done.returncode == 0, f"{argument}: the process ended with {done.returncode}: {done.stderr[-2000:]}"
    return Outcome(**json.loads(done.stdout.splitlines()[-1]))
