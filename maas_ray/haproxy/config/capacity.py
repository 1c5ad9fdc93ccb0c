"""How many connections HAProxy can hold with the open files of its process, and the file that says so. Text in, text out.

HAProxy does not start if its limit of open files is below what its configuration may need, and Serve, which writes one
number for all nodes, says nothing of the reason.
"""

import json
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.config.sections import Section, Unexpected, named, replace, split
from maas_ray.haproxy.names import CAPACITY_FILE
from maas_ray.process.private_files import write_private

MIN_CONNECTIONS = 100
"""With fewer a front would turn callers away that its replicas could answer: better to say so at the start."""
MAX_PIPES = 128
"""Bodies that are passed on without being copied at a time; further ones are copied. Linux lets all programs of a user
without privileges have pipes of 64 MiB together, and gives them tiny ones past that: this is half of it."""
_FILES_PER_CONNECTION = 2
_FILES_PER_PIPE = 2
_CONNECTIONS_PER_PIPE = 8
_OWN_FILES = 96
"""Listeners, admin sockets, those of threads, and the sockets of the HAProxy that is replaced (measured: 37, four threads)."""


class TooFewFiles(Unexpected):
    """HAProxy could not hold enough connections to be of use."""


class Capacity(NamedTuple):
    """What one HAProxy can hold."""

    max_connections: int
    """Of callers, at a time."""
    wanted_connections: int
    """What the cluster's configuration asks for."""
    open_files: int
    """The limit from which it follows."""
    max_pipes: int

    @property
    def is_reduced(self) -> bool:
        """Whether it is less than the configuration asks for."""
        return self.max_connections < self.wanted_connections

    def __str__(self) -> str:
        return (
            f"HAProxy takes {self.max_connections} connections instead of {self.wanted_connections}, because it may have "
            f"{self.open_files} open files"
        )


def capacity(config: str, open_files: int) -> Capacity:
    """What an HAProxy can hold.

    Args:
        config: Serve's, with the number of connections that is asked for and all servers.
        open_files: limit of the process in which it will run.

    Raises:
        TooFewFiles: it would be fewer connections than `MIN_CONNECTIONS`.
        Unexpected: the configuration does not say how many connections are asked for.
    """
    sections = split(config)
    lines = [line.split() for line in named(sections, "global")]
    wanted = next((int(words[1]) for words in lines if words[:1] == ["maxconn"] and words[1:2]), 0)
    if not wanted:
        raise Unexpected("no line 'maxconn' in the section 'global'")
    # A server is checked over a connection of its own; twins, which harden.py adds, share the check of their server.
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
    """Puts a capacity into the section `global`."""
    replace(section, "maxconn ", lambda _: f"    maxconn {found.max_connections}")
    section[1:1] = [f"    maxpipes {found.max_pipes}"]


def write_capacity(directory: Path, found: Capacity) -> None:
    """Leaves a capacity beside the configuration, for `status` and `doctor`."""
    write_private(directory / CAPACITY_FILE, json.dumps(found._asdict()))


def read_capacities(parent: Path) -> list[Capacity]:
    """What the HAProxys below a directory can hold, one for each node of this machine; what is damaged is left out."""
    found = []
    for file in sorted(parent.glob(f"*/{CAPACITY_FILE}")):
        try:
            found.append(Capacity(**{name: int(value) for name, value in json.loads(file.read_text()).items()}))
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return found
