"""Records of each HAProxy started for one directory: its process, how to restart it, and its servers."""

import json
import re
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.names import ADMIN_SOCKET
from maas_ray.haproxy.process import Process
from maas_ray.process.private_files import write_private

_FILES = "generation-*.json"
_ADMIN = re.compile(r"^\s+stats socket (\S+)", re.MULTILINE)
_SERVER = re.compile(r"^\s+server (\S+) (\S+):(\d+) ", re.MULTILINE)
_STATE_FILE = re.compile(r"^\s+server-state-file (\S+)", re.MULTILINE)
_BIND = re.compile(r"^\s+bind .+$|^\s+stats socket .+$", re.MULTILINE)
_APPLICATION = re.compile(r"^\s+use_backend ", re.MULTILINE)
# Serve's health response of a node that will lose its front.
_DRAINING = re.compile(
    r'return status 503 content-type text/plain string "[^"]*drain[^"]*" if healthcheck', re.IGNORECASE
)


class Generation(NamedTuple):
    """One HAProxy process."""

    process: Process
    manager: Process
    """Serve's actor, which started it and is the only one that can reload it."""
    binary: str
    flags: list[str]
    """Arguments except the file and those of a takeover."""
    config: str
    started_s: float
    """Start time on the machine's monotonic clock."""

    @property
    def is_leaving(self) -> bool:
        """Whether its node will lose its front: Serve lets it answer its last requests."""
        return bool(_DRAINING.search(self.config))


def record(directory: Path, generation: Generation) -> None:
    """Writes the record, for the keeper."""
    write_private(directory / f"generation-{generation.process.pid}.json", json.dumps(generation))


def recorded(directory: Path) -> list[Generation]:
    """Returns all records, newest first; damaged ones are skipped."""
    found = []
    for file in directory.glob(_FILES):
        with suppress(OSError, ValueError, TypeError):
            process, manager, *rest = json.loads(file.read_text())
            found.append(Generation(Process(*process), Process(*manager), *rest))
    return sorted(found, key=lambda generation: generation.started_s, reverse=True)


def forget(directory: Path, generation: Generation) -> None:
    """Removes the record."""
    (directory / f"generation-{generation.process.pid}.json").unlink(missing_ok=True)


def now_s() -> float:
    """Returns the time on the clock of `started_s`, which all processes of the machine share."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


def admin_socket(config: str, directory: Path) -> Path:
    """Returns the path of the admin socket in this configuration."""
    found = _ADMIN.search(config)
    return Path(found[1]) if found else directory / ADMIN_SOCKET


def state_file(config: str) -> Path | None:
    """Returns the file in which Serve keeps the state of the servers between two HAProxy processes."""
    found = _STATE_FILE.search(config)
    return Path(found[1]) if found else None


def servers(config: str) -> list[tuple[str, int]]:
    """Returns the addresses of all servers, each once."""
    return list(dict.fromkeys((host.strip("[]"), int(port)) for _, host, port in _SERVER.findall(config)))


def has_applications(config: str) -> bool:
    """Whether the configuration routes to any application."""
    return bool(_APPLICATION.search(config))


def listens_alike(one: str, other: str) -> bool:
    """Whether two configurations have the same addresses for clients and for commands."""
    return _BIND.findall(one) == _BIND.findall(other)
