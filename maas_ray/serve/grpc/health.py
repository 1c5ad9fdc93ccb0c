"""`grpc.health.v1`: health checks of Kubernetes probes and gRPC load balancers. Independent of servers.

Source: github.com/grpc/grpc, doc/health-checking.md. The known services are the empty name (the whole server), the
protocol's service and this one; all are ready whenever the pool is.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from grpc_health.v1 import health_pb2

from maas_ray.errors import NotFound
from maas_ray.serve.grpc.entry import HEALTH, SERVICE
from maas_ray.serve.grpc.inference.message import parse
from maas_ray.suggestions import known_names

WATCH_EVERY_S = 1.0
"""Seconds between two checks of a watched status."""
_KNOWN = frozenset({"", SERVICE, HEALTH})


class Health:
    """Both methods of the service.

    Args:
        is_ready: returns whether the pool accepts requests.
    """

    def __init__(self, is_ready: Callable[[], bool]) -> None:
        self._is_ready = is_ready

    def check(self, body: bytes) -> bytes:
        """Returns the status of a service.

        Raises:
            BadRequest: not a valid message.
            NotFound: no such service.
        """
        service = self._service(body)
        if service not in _KNOWN:
            there = known_names(service[:100], sorted(_KNOWN - {""}), "services")
            raise NotFound(f"no service {service[:100]!r}; {there}")
        return _response(self._status(service))

    async def watch(self, body: bytes) -> AsyncIterator[bytes]:
        """Yields the current status, and each change of it, until the client disconnects.

        Raises:
            BadRequest: not a valid message.
        """
        service = self._service(body)
        last = None
        while True:
            status = self._status(service)
            if status != last:
                last = status
                yield _response(status)
            await asyncio.sleep(WATCH_EVERY_S)

    def _service(self, body: bytes) -> str:
        return str(parse(health_pb2.HealthCheckRequest, body).service)

    def _status(self, service: str) -> Any:
        kinds = health_pb2.HealthCheckResponse
        if service not in _KNOWN:
            return kinds.SERVICE_UNKNOWN
        return kinds.SERVING if self._is_ready() else kinds.NOT_SERVING


def _response(status: Any) -> bytes:
    return bytes(health_pb2.HealthCheckResponse(status=status).SerializeToString())
