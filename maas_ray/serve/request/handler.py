"""Request handler of a replica: the state and the operations that all its transports share. Independent of protocols.

Inference is answered by callback, so that a protocol class needs no task per request; everything else is awaited.
"""

import asyncio
from collections.abc import Sequence

from maas_ray.serve.controller.autoscaling import Meter
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.call import Call
from maas_ray.serve.request.descriptions import Descriptions
from maas_ray.serve.request.offload import Workers
from maas_ray.serve.request.pool_operations import Peers, PoolOperations
from maas_ray.serve.request.request import AnswerT, MessageT, Request, Responder
from maas_ray.serve.telemetry.request_record import Observer

OBSERVER_TIMEOUT_S = 3.0
"""Maximum wait, at the end, until log lines and spans are written."""


class Handler:
    """Request handler of one replica.

    Args:
        manager: models.
        peers: the other replicas of the pool; None: there are none.
        observers: receive a record of each completed request.
    """

    def __init__(
        self, manager: ModelManager, *, peers: Peers | None = None, observers: Sequence[Observer] = ()
    ) -> None:
        self.manager = manager
        self.observers = tuple(observers)
        self.workers = Workers(manager.budget)
        """Parse large bodies and write large responses."""
        self.num_ongoing = 0
        """Inference requests that were received and not answered; used for autoscaling."""
        self.descriptions = Descriptions(manager)
        self.pool = PoolOperations(manager, peers)
        self._meter = Meter()

    def infer(self, request: Request[MessageT, AnswerT], responder: Responder[AnswerT]) -> Call[MessageT, AnswerT]:
        """Answers one inference request.

        Args:
            request: the request.
            responder: receives the result, possibly before this returns; not after `cancel`.

        Returns:
            The call, for `cancel`.
        """
        call = Call(self, request, responder)
        call.start()
        return call

    def load(self) -> dict[str, float]:
        """Returns the metrics for autoscaling."""
        return self._meter.read(self.manager.stats.snapshot(), self.num_ongoing)

    async def close(self, drain_timeout_s: float) -> None:
        """Answers waiting requests, for at most `drain_timeout_s`; then releases everything."""
        await self.manager.close(drain_timeout_s)
        self.workers.close()
        for observer in self.observers:
            await asyncio.to_thread(observer.close, OBSERVER_TIMEOUT_S)
