"""One inference request of a gRPC call, from its bytes to its outcome. Independent of servers."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.errors import DeadlineExceeded
from maas_ray.serve.grpc.inference.message import ModelInfer
from maas_ray.serve.grpc.inference.message_format import Result
from maas_ray.serve.request.call import Call
from maas_ray.serve.request.head import Header


class Pending:
    """An inference request in progress, and the receiver of its outcome."""

    __slots__ = ("_loop", "_parsing", "_task", "asks_for_final", "call", "id", "result")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.result: asyncio.Future[Result] = loop.create_future()
        """Receives the outcome; a result has the parts of a `ModelInferResponse`."""
        self.call: Call[ModelInfer, Result] | None = None
        self.id = ""
        self.asks_for_final = False
        self._parsing: tuple[StopSignal, asyncio.TimerHandle] | None = None
        self._task: asyncio.Task[None] | None = None

    def follow(self, work: Coroutine[Any, Any, None]) -> None:
        """Starts the task that sets the result."""
        self._task = self._loop.create_task(work)

    def parse_by(self, deadline: float, stop: StopSignal) -> None:
        """Sets a deadline for the parsing of its message, which is in progress in a thread."""
        late = DeadlineExceeded("parsing the message exceeded the deadline; allow more time or send less data")
        self._parsing = stop, self._loop.call_at(deadline, self.refuse, late)

    def end_parsing(self) -> None:
        """Ends the parsing of its message."""
        if self._parsing is not None:
            stop, timer = self._parsing
            stop.set()
            timer.cancel()
            self._parsing = None

    def send(self, answer: Result) -> None:
        """Answers with a response."""
        if not self.result.done():
            self.result.set_result(answer)

    def refuse(self, error: Exception, headers: tuple[Header, ...] = ()) -> None:
        """Answers with an error; a gRPC error has no headers of a version."""
        self.end_parsing()
        if not self.result.done():
            self.result.set_exception(error)

    def close(self) -> None:
        """Cancels the request, unless it has been answered, and releases it."""
        self.end_parsing()
        if self._task is not None:
            self._task.cancel()
        if self.call is not None:
            self.call.cancel()
            self.call = None  # it references this object
        if self.result.done() and not self.result.cancelled():
            self.result.exception()  # retrieves the error, so that asyncio does not report it
        self.result.cancel()
