"""Requests of one stream: several run at once, and they are answered in order."""

import asyncio
from collections import deque

from maas_ray.serve.grpc.inference.pending import Pending

MAX_PIPELINED = 64
"""Maximum waiting and running requests of one stream; the next one is read once the oldest is answered."""


class RequestPipeline:
    """Requests of one stream in order, at most `MAX_PIPELINED`."""

    def __init__(self) -> None:
        self._requests: deque[Pending] = deque()
        self._changed = asyncio.Event()
        self._has_ended = False
        self._failure: BaseException | None = None

    async def has_room(self) -> None:
        """Waits until another request may be added."""
        while len(self._requests) >= MAX_PIPELINED:
            self._changed.clear()
            await self._changed.wait()

    def add(self, pending: Pending) -> None:
        """Adds the latest request."""
        self._requests.append(pending)
        self._changed.set()

    async def oldest(self) -> Pending | None:
        """Waits for a request; returns None once the client has sent all requests and they have been answered."""
        while not self._requests:
            if self._failure is not None:
                raise self._failure
            if self._has_ended:
                return None
            self._changed.clear()
            await self._changed.wait()
        return self._requests[0]

    def remove_oldest(self) -> None:
        """Called once the oldest request is answered."""
        self._requests.popleft().close()
        self._changed.set()

    def end(self, reader: "asyncio.Task[None]") -> None:
        """Marks the end of the requests."""
        self._failure = None if reader.cancelled() else reader.exception()
        self._has_ended = True
        self._changed.set()

    def close(self) -> None:
        """Cancels all requests."""
        for pending in self._requests:
            pending.close()
