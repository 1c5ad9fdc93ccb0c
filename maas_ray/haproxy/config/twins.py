"""Twins: second back ends with the servers and health checks of a first, for requests that need other options."""

from collections.abc import Mapping

from maas_ray.haproxy.config.sections import Section

READS = "reads-"
"""Prefix of the twin for GET and HEAD; the names of Serve's own back ends begin with the protocol."""
UNARY = "unary-"
"""Prefix of the twin for unary gRPC calls."""
_LEFT_OUT = ("default-server ", "option httpchk ", "http-check ", "option tcp-check", "tcp-check ", "#")
TCP_TIMEOUT = "tcp-ut 3s"
"""Server option: a connection ends when its host has not acknowledged data for this time, the time that checks need."""
_KEPT = ("backup", "proto h2", TCP_TIMEOUT)
"""Server options that work without checks. A server that observes its own traffic would stay down permanently; this one
goes up with the server that it tracks."""


def twin_of(section: Section, prefix: str, lines: Section) -> Section:
    """Returns the same back end under another name.

    Args:
        section: first back end.
        prefix: prefix of the name.
        lines: additional lines; first, since the first matching `http-request` applies.
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
    """Returns the first back end of a twin; any other back end unchanged."""
    return backend.removeprefix(READS).removeprefix(UNARY)


def lead_to(twins: Mapping[str, str], frontend: Section, condition: str) -> None:
    """Adds rules that route requests to twins.

    Args:
        twins: names of twins, by the first back end.
        frontend: front end; before each of its rules for a first back end, a rule for the twin is inserted.
        condition: condition for the twins; evaluated first, so it should be cheap.
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
