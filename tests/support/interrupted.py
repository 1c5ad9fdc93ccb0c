"""Commands as real processes that are sent signals at a known moment."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.support.root import ROOT

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    stdout: str
    stderr: str

    def said(self, number: signal.Signals) -> str:
        """The one line of an interruption; fails if there is another one, a traceback, or another exit code."""
        assert self.code == 128 + number, self
        for trace in ("Traceback", "*** SIG", "Aborted", "Exception ignored"):
            assert trace not in self.stderr, self.stderr
        (line,) = re.findall(rf"^interrupted\[{number.name}\]: (.+)$", self.stderr, re.MULTILINE)
        return str(line)


class Command:
    """`maas-ray …`, started and not waited for.

    Args:
        arguments: of the command; a path of a script runs that one instead.
        env: further variables.
    """

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        start = [arguments[0]] if arguments[0].endswith(".py") else ["-m", "maas_ray.cli", arguments[0]]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, *start, *arguments[1:]],
            env={**inherited, "PYTHONPATH": str(ROOT), **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # as a job of a shell with job control: no signal of the tests' own terminal
            preexec_fn=_heed,
        )

    def when_it_heeds(self, timeout_s: float = 60.0) -> "Command":
        """Waits until the process has handlers of its own: from then on it has to end in order."""
        self.when(lambda: self._heeds(), timeout_s)
        return self

    def when(self, is_there: Callable[[], object], timeout_s: float = 120.0) -> "Command":
        """Waits for a moment of its work."""
        deadline = time.monotonic() + timeout_s
        while not is_there():
            assert self.process.poll() is None, self.process.communicate()
            assert time.monotonic() < deadline, "the moment did not come"
            time.sleep(0.01)
        return self

    def send(self, *numbers: signal.Signals, pause_s: float = 0.3) -> "Command":
        """Sends signals, with a pause between them: two of one kind at a time are one."""
        for index, number in enumerate(numbers):
            time.sleep(pause_s if index else 0)
            self.process.send_signal(number)
        return self

    def end(self, timeout_s: float = 120.0) -> Ended:
        """Waits for its end."""
        try:
            stdout, stderr = self.process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        return Ended(self.process.returncode, stdout, stderr)

    def _heeds(self) -> bool:
        found = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{self.process.pid}/status").read_text(), re.MULTILINE)
        mask = int(found[1], 16) if found else 0
        return all(mask >> (number - 1) & 1 for number in SIGNALS)


def _heed() -> None:
    # A shell ignores SIGINT for what runs in its background, and a test runner may run there.
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
