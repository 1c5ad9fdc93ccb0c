"""gRPC calls that cannot name a pool: health checks and reflection reach one of ours that is awake."""

import re

from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.haproxy.pools import replicas_of
from maas_ray.haproxy.sections import Section, replace

_CHOICE = re.compile(r"\s+use_backend (\S+) if is_\1$")
_UNNAMED = "{ path_beg /grpc.health.v1.Health/ /grpc.reflection. } !{ req.hdr(application) -m found }"


def route_unnamed(frontend: Section, sections: list[Section]) -> None:
    """Sends probes and reflection without the metadata `application` to the first pool of ours that is awake.

    Kubernetes' probes cannot send metadata. Where there is one application, Serve's own rule does so; another's
    application is never chosen.

    Args:
        frontend: of gRPC.
        sections: the whole configuration.
    """
    names = [match[1] for line in frontend if (match := _CHOICE.match(line))]
    servers = {section[0].removeprefix("backend "): replicas_of(section) for section in sections}
    awake = [name for name in names if any(map(_is_ours, servers.get(name, ())))]
    if len(names) > 1 and awake:
        replace(frontend, "default_backend ", lambda line: f"    use_backend {awake[0]} if {_UNNAMED}\n{line}")


def _is_ours(server: str) -> bool:
    # Serve's names: `SERVE_REPLICA_<application>-<deployment>-<id>`.
    return server.rpartition("-")[0].endswith((f"-{REPLAYABLE}", f"-{NOT_REPLAYABLE}"))
