"""Broadcast: calls all replicas of a pool, through a handle of the deployment to itself.

Works with and without HTTP servers in the replicas.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from ray import serve

from maas_ray.display import get_logger
from maas_ray.ray_internals.serve import replica_results
from maas_ray.serve.request.peers import Answers, collect

log = get_logger(__name__)

PEERS_TIMEOUT_S = 3.0
"""Maximum wait for the replicas of a pool; Prometheus itself waits 10 s for a scrape."""


class Broadcast:
    """All replicas of a deployment.

    Args:
        deployment: name of the deployment.
        application: application of the deployment.
        here: answers for this replica; used alone if Serve offers no replica, as when the pool stops.
        timeout_s: maximum wait for the results.
    """

    def __init__(
        self,
        deployment: str,
        application: str,
        here: Callable[[str, str], Awaitable[Any]],
        timeout_s: float = PEERS_TIMEOUT_S,
    ) -> None:
        self._names = (deployment, application)
        self._here = here
        self._timeout_s = timeout_s
        self._handle: Any = None

    async def ask(self, question: str, argument: str = "") -> Answers:
        """Returns the results of `ask_here` of each replica that answers in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                calls = await self._calls(question, argument)
        except Exception as error:  # Serve raises many kinds of errors for a deployment that loses its last replica
            log.info("only this replica answered %r: %s", question, type(error).__name__)
            return Answers([await self._here(question, argument)])
        answers = await collect((call.get_async() for call in calls), self._timeout_s)
        # The call may have found only replicas that were stopping.
        return answers if answers or answers.num_silent else Answers([await self._here(question, argument)])

    async def _calls(self, question: str, argument: str) -> list[Any]:
        if self._handle is None:
            self._handle = serve.get_deployment_handle(*self._names)
        response = self._handle.broadcast("ask_here", question, argument)
        return await replica_results(response)
