"""uvicorn's own protocol, for all requests that the protocol class does not answer: everything but plain inference."""

import asyncio
from typing import Any, Protocol

import httptools
from uvicorn.config import Config
from uvicorn.server import ServerState

from maas_ray.serve.http.checked_parser import CheckedHttpProtocol
from maas_ray.serve.http.raw_head import declared_length, without_upgrade


class OwningConnection(Protocol):
    """The connection that this protocol serves temporarily."""

    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport

    def cold_is_done(self) -> None:
        """Called when no message is open any more."""
        ...


class ColdProtocol(CheckedHttpProtocol):
    """Reports when no message is open."""

    def __init__(self, owner: OwningConnection, config: Config, state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config, state, app_state, owner.loop)
        self.owner = owner
        self.num_open = 0
        """Messages that have begun and whose body or response is not complete; each counts twice."""
        self.is_reading = False

    @property
    def only_reads(self) -> bool:
        """Whether every open message is a complete GET or HEAD."""
        return self.num_open > 0 and not self.is_reading and self.scope["method"] in ("GET", "HEAD")

    def on_message_begin(self) -> None:
        self.num_open += 2
        self.is_reading = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        if b"#" in url:  # RFC 9112 3.2: a target has no fragment; another parser could see another path
            raise httptools.HttpParserError("the target has a fragment")
        super().on_url(url)

    def on_message_complete(self) -> None:
        self.is_reading = False
        super().on_message_complete()
        self._closed_one()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        # Time limits of idle connections are enforced by the owner.
        self._unset_keepalive_if_required()
        self._closed_one()

    def handle_websocket_upgrade(self) -> None:
        self.send_400_response("Upgrades are not supported.")

    def _should_upgrade_to_ws(self) -> bool:
        return False

    def _closed_one(self) -> None:
        self.num_open -= 1
        if self.num_open == 0:
            self.owner.cold_is_done()


class AsgiFallback:
    """The protocol above for one connection, created by the first request that needs it.

    Args:
        owner: the connection.
        config: uvicorn's configuration.
        server_state: uvicorn's state.
        app_state: uvicorn's application state.
    """

    __slots__ = ("_app_state", "_cold", "_config", "_owner", "_server_state", "received")

    def __init__(
        self, owner: OwningConnection, config: Config, server_state: ServerState, app_state: dict[str, Any]
    ) -> None:
        self._owner = owner
        self._config = config
        self._server_state = server_state
        self._app_state = app_state
        self._cold: ColdProtocol | None = None
        self.received = 0
        """Bytes of the message after its head."""

    @property
    def only_reads(self) -> bool:
        """Whether every open message is a complete GET or HEAD."""
        return self._cold is not None and self._cold.only_reads

    @property
    def is_reading(self) -> bool:
        """Whether the message is not complete."""
        return self._cold is not None and self._cold.is_reading

    @property
    def has_begun_response(self) -> bool:
        """Whether the response to the message has begun."""
        return self._cold is not None and self._cold.cycle is not None and self._cold.cycle.response_started

    def begin(self, data: bytes, end: int) -> tuple[bytes, bytes]:
        """Begins a message.

        Args:
            data: bytes that begin with its head.
            end: bytes of the head.

        Returns:
            What to `feed` first, and the bytes of later messages.
        """
        if self._cold is None:
            self._cold = ColdProtocol(self._owner, self._config, self._server_state, self._app_state)
            self._cold.connection_made(self._owner.transport)
            self._server_state.connections.discard(self._cold)  # the owner represents both
        head = without_upgrade(data[:end])
        if len(head) < end:  # the parser would treat the body as bytes of the other protocol
            data, end = head + data[end:], len(head)
        self.received = -end
        size = declared_length(data[:end])
        if size is None or len(data) - end <= size:
            return data, b""
        return data[: end + size], data[end + size :]

    def feed(self, data: bytes) -> bool:
        """Parses bytes of the message; False if none has begun."""
        cold = self._cold
        if cold is None:
            return True
        self.received += len(data)
        cold.data_received(data)
        return cold.num_open > 0

    def pause_writing(self) -> None:
        """The transport's buffer is full."""
        if self._cold is not None:
            self._cold.pause_writing()

    def resume_writing(self) -> None:
        """The transport's buffer has room."""
        if self._cold is not None:
            self._cold.resume_writing()

    def shutdown(self) -> None:
        """Closes the connection once the message is answered."""
        if self._cold is not None:
            self._cold.shutdown()

    def lost(self, error: Exception | None) -> None:
        """The connection was closed."""
        if self._cold is not None:
            self._cold.connection_lost(error)
            self._cold = None
