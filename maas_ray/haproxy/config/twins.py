"""A second back end on the servers of a first, for requests that need other options. The first one makes the health checks."""

from collections.abc import Mapping

from maas_ray.haproxy.config.sections import Section

READS = "reads-"
"""Before the name of the twin for GET and HEAD; the names of Serve's own back ends begin with the protocol."""
UNARY = "unary-"
"""Before the name of the twin for gRPC calls of one request and one response."""
_LEFT_OUT = ("default-server ", "option httpchk ", "http-check ", "option tcp-check", "tcp-check ", "#")
TCP_TIMEOUT = "tcp-ut 3s"
"""Option of a server: a connection ends when its host has acknowledged nothing for so long, the time that checks need."""
_KEPT = ("backup", "proto h2", TCP_TIMEOUT)
"""Options of a server that hold without checks of its own. What it observes itself would take it down for good: it comes up
with the one that it tracks."""


def twin_of(section: Section, prefix: str, lines: Section) -> Section:
    """The same back end under another name.

    Args:
        section: the first one.
        prefix: before its name.
        lines: what is different; first, since the first `http-request` that applies counts.
    """
    name = section[0].removeprefix("backend ")
    twin = [f"backend {prefix}{name}", *lines]
    for line in section[1:]:
        words = line.split()
        if words[:1] == ["server"]:
            kept = [option for option in _KEPT if f" {option}" in line]
            twin.append(" ".join(["    server", *words[1:3], f"track {name}/{words[1]}", *kept]))
        elif not line.strip().startswith(_LEFT_OUT):
            twin.append(line)
    return twin


def first_of(backend: str) -> str:
    """The back end that a twin belongs to; any other is its own."""
    return backend.removeprefix(READS).removeprefix(UNARY)


def lead_to(twins: Mapping[str, str], frontend: Section, condition: str) -> None:
    """Sends requests to twins.

    Args:
        twins: by the first one.
        frontend: before each of its rules that chooses a first one comes one that chooses its twin.
        condition: which requests the twins are for; asked first, so it should be cheap.
    """
    rules: Section = []
    for line in frontend:
        words = line.split()
        if words[:1] in (["use_backend"], ["default_backend"]) and words[1] in twins:
            rules.append(f"    use_backend {twins[words[1]]} if {' '.join([condition, *words[3:]])}")
        rules.append(line)
    frontend[:] = rules


def has_servers(section: Section) -> bool:
    """Whether a back end has any server."""
    return any(line.startswith("    server ") for line in section)
