"""Commands in a terminal of their own, whose keys are pressed: Ctrl-C reaches every process of the command."""

import fcntl
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Mapping

from tests.support.root import ROOT

CTRL_C = b"\x03"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


class Terminal:
    """`maas-ray …` in the foreground of a new terminal.

    Args:
        arguments: of the command.
        env: further variables.
    """

    def __init__(self, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self._keys, terminal = pty.openpty()
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "maas_ray.cli", *arguments],
            env={**inherited, "PYTHONPATH": str(ROOT), "COLUMNS": "400", **(env or {})},
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(terminal)
        self._output = b""

    @property
    def output(self) -> str:
        """What it has printed so far, without control sequences."""
        while select.select([self._keys], [], [], 0)[0]:
            try:
                if not (read := os.read(self._keys, 65536)):
                    break
            except OSError:  # no process has the terminal open
                break
            self._output += read
        return _CONTROL.sub("", self._output.decode(errors="replace"))

    def when(self, is_there: Callable[[], object], timeout_s: float = 240.0) -> "Terminal":
        """Waits for a moment of its work."""
        deadline = time.monotonic() + timeout_s
        while not is_there():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, f"the moment did not come: {self.output}"
            time.sleep(0.02)
        return self

    def press(self, *keys: bytes, pause_s: float = 0.5) -> "Terminal":
        """Presses keys, with a pause between them."""
        for index, key in enumerate(keys):
            time.sleep(pause_s if index else 0)
            os.write(self._keys, key)
        return self

    def end(self, timeout_s: float = 180.0) -> int:
        """Waits for its end; returns the exit code."""
        deadline = time.monotonic() + timeout_s
        while self.process.poll() is None:
            _ = self.output  # a full terminal would block it
            if time.monotonic() > deadline:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise AssertionError(f"it did not end: {self.output}")
            time.sleep(0.02)
        _ = self.output
        return self.process.returncode

    def close(self) -> None:
        """Closes the terminal."""
        os.close(self._keys)


def _take_terminal() -> None:
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
