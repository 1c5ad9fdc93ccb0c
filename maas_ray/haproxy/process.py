"""Processes of this machine, by pid and start time, so that a reused pid is not mistaken. Independent of HAProxy."""

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One process."""

    pid: int
    started: int
    """Start time in clock ticks since the machine started; 0: never a living process."""

    @property
    def state(self) -> str:
        """`R`, `S`, `T` (stopped by a signal), …; empty once it has ended, even if its exit code was not collected."""
        fields = _stat(self.pid)
        return fields[0] if fields and int(fields[19]) == self.started and fields[0] not in "ZX" else ""

    @property
    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return bool(self.state)

    @property
    def command(self) -> list[str]:
        """Its command line; empty if it has ended."""
        return command_of(self.pid) if self.is_alive else []

    def send(self, number: signal.Signals) -> None:
        """Sends a signal, if it is alive."""
        if self.is_alive:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, number)


def find(pid: int) -> Process:
    """Returns the process that has this pid now."""
    fields = _stat(pid)
    return Process(pid, int(fields[19]) if fields else 0)


def command_of(pid: int) -> list[str]:
    """Returns the command line of a pid; empty if there is none."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return []


def _stat(pid: int) -> list[str]:
    """Returns the fields of proc(5) from the third one on, after the name, which may contain any character."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return []
