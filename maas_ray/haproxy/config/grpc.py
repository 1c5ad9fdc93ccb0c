"""gRPC: routes calls that name no pool to a running one of ours, and repeats unary calls like HTTP requests."""

import re
from collections.abc import Mapping

from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.config.pools import is_replayable, replay, replicas_of, server_timeout
from maas_ray.haproxy.config.sections import Section, replace
from maas_ray.haproxy.config.twins import TCP_TIMEOUT, UNARY, has_servers, lead_to, twin_of
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE, UNNAMED_HEADER

_CHOICE = re.compile(r"\s+use_backend (\S+) if is_\1$")
_IS_NAMED = "{ req.hdr(application) -m found }"
_FALLBACK = "grpc_fallback_backend"
_UNSET = re.compile(r"Application metadata not set\.")
_GRPC = "backend grpc-"
_REPEATABLE = "ModelInfer ModelReady ModelMetadata ModelConfig ModelStatistics RepositoryIndex ServerLive ServerReady ServerMetadata"
"""Unary methods that may be repeated; the client must repeat loads and unloads."""
_WAY_OUT = "send the name of the pool as the metadata 'application'."


def route_unnamed(frontend: Section, sections: list[Section]) -> None:
    """Sends calls without the metadata `application` to the first running pool of ours, with a mark.

    Probes cannot send metadata, and other clients do not know that there are several pools. If there is only one
    application, Serve's own rule sends all calls to it; an application that is not ours is never chosen. If no pool is
    running, Serve's proxy chooses.

    Args:
        frontend: gRPC front end.
        sections: whole configuration.
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


def add_unary_twins(sections: list[Section], frontend: Section, limits: Mapping[str, PoolLimits]) -> None:
    """Adds twins for unary calls to the back ends of pools, and the rules that route to them.

    Such a call has the time limit of its pool, and is repeated if the pool is idempotent. Serve's own back ends are for
    streams, which may be silent for long and are not buffered until their last request.

    Args:
        sections: whole configuration.
        frontend: gRPC front end.
        limits: limits by application.
    """
    twins: dict[str, str] = {}
    for section in [section for section in sections if section[0].startswith(_GRPC) and has_servers(section)]:
        found = limits.get(section[0].removeprefix(_GRPC))
        lines = [server_timeout(found)] if found is not None and all(map(_is_ours, replicas_of(section))) else []
        if is_replayable(section):
            lines += replay()
        if lines:
            # Calls share connections. A connection to a host that was cut off outlives the calls that are freed
            # (haproxy/silent.py), and TCP retransmits its data ever more rarely: calls after the host's return waited 4
            # s for a cut of 10 s.
            section[:] = [f"{line} {TCP_TIMEOUT}" if replicas_of([line]) else line for line in section]
            name = section[0].removeprefix("backend ")
            twins[name] = f"{UNARY}{name}"
            sections.append(twin_of(section, UNARY, lines))
    if twins:
        paths = " ".join(f"/inference.GRPCInferenceService/{method}" for method in _REPEATABLE.split())
        replace(frontend, "mode http", lambda line: f"{line}\n    acl is_unary path -m str {paths}")
        lead_to(twins, frontend, "is_unary")


def _is_ours(server: str) -> bool:
    # Serve's names: `SERVE_REPLICA_<application>-<deployment>-<id>`.
    return server.rpartition("-")[0].endswith((f"-{REPLAYABLE}", f"-{NOT_REPLAYABLE}"))
