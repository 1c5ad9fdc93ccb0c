"""Replica of a pool inside Ray Serve, with the usual model manager, handler and fronts. Never imports torch."""

import asyncio
import gc
import os
import sys
from typing import Any

from ray import serve

from maas_ray.serve.front.haproxy_limits import publish
from maas_ray.serve.front.replica_access import front_check
from maas_ray.serve.grpc import entry
from maas_ray.serve.grpc.methods import GrpcMethods
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.grpc.unnamed import Unnamed
from maas_ray.serve.http.asgi_app import App
from maas_ray.serve.http.server_state import HttpServerState
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.replica import server_hook
from maas_ray.serve.replica.broadcast import Broadcast
from maas_ray.serve.replica.connection_limit import allowed_connections
from maas_ray.serve.replica.other_pools import RayNeighbors
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.serve.telemetry.access_log import open_access_log
from maas_ray.serve.telemetry.stats import ReplicaStats
from maas_ray.serve.telemetry.tracing import open_tracer
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store

SWITCH_INTERVAL_S = 0.0001
"""By default Python lets a thread run for 5 ms before another one gets the interpreter; Ray's background threads would
delay requests by that time."""
GARBAGE_THRESHOLD = 10_000
"""By default Python searches for cycles whenever 700 more objects were created than freed: with a hundred concurrent
requests that is every few batches, 5 to 9 % of the CPU time of a request of a tiny model (36 to 34 and 44 to 40
microseconds at 128 and 32 connections). A request creates no cycles."""


class Replica(GrpcMethods):
    """Deployment class.

    Args:
        spec: an `ApplicationSpec` as plain values; validated again in this process.

    Raises:
        MaasError: a model cannot be resolved or loaded; Serve shows the message as the reason of the failed start.
    """

    async def __init__(self, spec: dict[str, Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        self._spec = parse_spec(ApplicationSpec, spec, source="application")
        context = serve.get_replica_context()
        replica = context.replica_id.unique_id
        await asyncio.to_thread(publish, context.app_name, self._spec.limits)  # before Serve shows us to HAProxy
        manager = ModelManager(
            open_store(self._spec.storage),
            self._spec,
            pool=context.app_name,
            stats=ReplicaStats(context.app_name, replica),
        )
        await manager.start()
        limits, observability = self._spec.limits, self._spec.observability
        access_log = open_access_log(observability.access_log, replica)
        tracer = open_tracer(observability.tracing, context.app_name, replica)
        if access_log is not None:
            manager.stats.log_drops = lambda: access_log.num_dropped
        self._handler = Handler(
            manager,
            peers=Broadcast(context.deployment, context.app_name, self.ask_here),
            observers=[observer for observer in (access_log, tracer) if observer is not None],
        )
        # Serve's wrapper appends the request id; without it, our app does.
        num_connections = allowed_connections(limits.max_connections, f"replica {replica} of pool {context.app_name}")
        server_hook.register(
            App(self._handler, limits), HttpServerState(self._handler, limits, max_connections=num_connections)
        )
        neighbors = RayNeighbors(context.app_name, context.deployment, manager)
        self._following = asyncio.create_task(neighbors.follow())  # ends with the model manager
        self.rpcs = Rpcs(
            Service(self._handler, limits),
            context.app_name,
            Unnamed(neighbors, context.app_name),
            front_check(os.environ),
        )
        entry.register(self.rpcs.services(), limits.max_body_bytes)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        gc.collect()
        gc.freeze()  # imported objects are permanent: scanning them again would take 0.1 s at a time
        gc.set_threshold(GARBAGE_THRESHOLD)

    def __serve_build_asgi_app__(self) -> App:
        # The end of its lifespan drains and closes the model manager.
        return App(self._handler, self._spec.limits, sends_request_id=False)

    async def ask_here(self, question: str, argument: str) -> Any:
        """Answers a call of `Broadcast` for this replica."""
        return await self._handler.pool.ask_here(question, argument)

    async def carry(self, method: str, body: bytes, metadata: dict[str, str], timeout_s: float) -> Any:
        """Answers a gRPC call that a replica of another pool has forwarded, with the fields of a `CallOutcome`."""
        return tuple(await self.rpcs.carry(method, body, metadata, timeout_s))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Returns the autoscaling metrics; Serve itself does not see requests that are answered before its wrapper."""
        return self._handler.load()

    async def check_health(self) -> None:
        """Called by Serve every few seconds; if it raises, Serve replaces this replica."""
        self._handler.manager.check_health()


Ingress: type[Replica] = serve.ingress()(Replica)
"""Class of the deployments; their options come from the pool."""
