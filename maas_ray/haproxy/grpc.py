"""gRPC calls that name no pool reach one of ours that is awake, which passes them on where another serves the model."""

import re

from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE, UNNAMED_HEADER
from maas_ray.haproxy.pools import replicas_of
from maas_ray.haproxy.sections import Section, replace

_CHOICE = re.compile(r"\s+use_backend (\S+) if is_\1$")
_IS_NAMED = "{ req.hdr(application) -m found }"
_FALLBACK = "grpc_fallback_backend"
_UNSET = re.compile(r"Application metadata not set\.")
_WAY_OUT = "send the name of the pool as the metadata 'application'."


def route_unnamed(frontend: Section, sections: list[Section]) -> None:
    """Sends calls without the metadata `application` to the first pool of ours that is awake, with a mark.

    Probes cannot send metadata, and other callers do not know that there are several pools. Where there is one
    application, Serve's own rule sends everything there; another's application is never chosen. Where no pool is awake,
    Serve's proxy chooses.

    Args:
        frontend: of gRPC.
        sections: the whole configuration.
    """
    for section in sections:
        if section[0] == "backend default_grpc_backend":
            section[:] = [_UNSET.sub(f"Application metadata not set: {_WAY_OUT}", line) for line in section]
    names = [match[1] for line in frontend if (match := _CHOICE.match(line))]
    servers = {section[0].removeprefix("backend "): replicas_of(section) for section in sections}
    awake = [name for name in names if any(map(_is_ours, servers.get(name, ())))]
    wakes = [_FALLBACK] if _FALLBACK in servers else []
    chosen = [*awake, *wakes]
    if len(names) < 2 or not chosen:
        return
    mark = f"    http-request set-header {UNNAMED_HEADER} 1 if !{_IS_NAMED}"
    replace(frontend, "mode http", lambda line: f"{line}\n{mark}")
    replace(frontend, "default_backend ", lambda line: f"    use_backend {chosen[0]} if !{_IS_NAMED}\n{line}")


def _is_ours(server: str) -> bool:
    # Serve's names: `SERVE_REPLICA_<application>-<deployment>-<id>`.
    return server.rpartition("-")[0].endswith((f"-{REPLAYABLE}", f"-{NOT_REPLAYABLE}"))
