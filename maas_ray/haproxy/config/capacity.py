"""Capacity: the number of connections that HAProxy can have with the open files of its process, and its record.

HAProxy does not start if its limit of open files is below the requirements of its configuration, and Serve, which
writes one number for all nodes, does not report the reason.
"""

import json
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.config.sections import Section, Unexpected, named, replace, split
from maas_ray.haproxy.names import CAPACITY_FILE
from maas_ray.process.private_files import write_private

MIN_CONNECTIONS = 100
"""With fewer, a front would refuse clients that its replicas could serve: it is better to fail at the start."""
MAX_PIPES = 128
"""Maximum number of bodies that are forwarded without a copy at a time; further ones are copied. Linux limits the pipes
of all programs of an unprivileged user to 64 MiB, and creates tiny ones above that: this is half of it."""
_FILES_PER_CONNECTION = 2
_FILES_PER_PIPE = 2
_CONNECTIONS_PER_PIPE = 8
_OWN_FILES = 96
"""Listeners, admin sockets, those of threads, and the sockets of the replaced HAProxy (measured: 37, four threads)."""


class TooFewFiles(Unexpected):
    """HAProxy could not have enough connections to be useful."""


class Capacity(NamedTuple):
    """Capacity of one HAProxy."""

    max_connections: int
    """Maximum concurrent connections of clients."""
    wanted_connections: int
    """Number in the cluster's configuration."""
    open_files: int
    """Limit of open files from which it follows."""
    max_pipes: int

    @property
    def is_reduced(self) -> bool:
        """Whether it is below the configured number."""
        return self.max_connections < self.wanted_connections

    def __str__(self) -> str:
        return (
            f"HAProxy accepts {self.max_connections} connections instead of {self.wanted_connections}, because it may "
            f"have {self.open_files} open files"
        )


def capacity(config: str, open_files: int) -> Capacity:
    """Returns the capacity of an HAProxy.

    Args:
        config: Serve's configuration, with the wanted number of connections and all servers.
        open_files: limit of the process in which it will run.

    Raises:
        TooFewFiles: it would have fewer than `MIN_CONNECTIONS` connections.
        Unexpected: the configuration does not contain the wanted number of connections.
    """
    sections = split(config)
    lines = [line.split() for line in named(sections, "global")]
    wanted = next((int(words[1]) for words in lines if words[:1] == ["maxconn"] and words[1:2]), 0)
    if not wanted:
        raise Unexpected("no line 'maxconn' in the section 'global'")
    # A server is checked over a separate connection; twins, which harden.py adds, share the check of their server.
    num_servers = sum(line.split()[:1] == ["server"] for section in sections for line in section)
    fixed = _OWN_FILES + num_servers
    per_connection = _FILES_PER_CONNECTION + _FILES_PER_PIPE / _CONNECTIONS_PER_PIPE
    pipes = min(MAX_PIPES, max(0, int((open_files - fixed) / per_connection / _CONNECTIONS_PER_PIPE)))
    possible = (open_files - fixed - _FILES_PER_PIPE * pipes) // _FILES_PER_CONNECTION
    needed = min(MIN_CONNECTIONS, wanted)
    if possible < needed:
        least = fixed + _FILES_PER_CONNECTION * MIN_CONNECTIONS + _FILES_PER_PIPE * (MIN_CONNECTIONS // 8 + 1)
        raise TooFewFiles(
            f"HAProxy may have {open_files} open files, which is too few for {MIN_CONNECTIONS} connections to {num_servers} "
            f"replicas; it needs {least}: raise the hard limit of `ray start` (ulimit -Hn, LimitNOFILE of systemd, "
            "--ulimit nofile of docker)"
        )
    return Capacity(min(wanted, possible), wanted, open_files, pipes)


def fit(section: Section, found: Capacity) -> None:
    """Writes a capacity into the section `global`."""
    replace(section, "maxconn ", lambda _: f"    maxconn {found.max_connections}")
    section[1:1] = [f"    maxpipes {found.max_pipes}"]


def write_capacity(directory: Path, found: Capacity) -> None:
    """Writes a capacity next to the configuration, for `status` and `doctor`."""
    write_private(directory / CAPACITY_FILE, json.dumps(found._asdict()))


def read_capacities(parent: Path) -> list[Capacity]:
    """Returns the capacities below a directory, one for each node of this machine; damaged records are skipped."""
    found = []
    for file in sorted(parent.glob(f"*/{CAPACITY_FILE}")):
        try:
            found.append(Capacity(**{name: int(value) for name, value in json.loads(file.read_text()).items()}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return found
