"""uvicorn's own protocol, for all requests that the protocol class does not answer: everything but plain inference."""

import asyncio
from typing import Any, Protocol

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from maas_ray.serve.http.raw_head import MAX_HEAD_BYTES, is_sound


class OwningConnection(Protocol):
    """The connection that this protocol serves temporarily."""

    loop: asyncio.AbstractEventLoop

    def cold_is_done(self) -> None:
        """Called when no message is open any more."""
        ...


class ColdProtocol(HttpToolsProtocol):
    """Reports when no message is open; has the same limits and validity checks as the protocol class."""

    def __init__(self, owner: OwningConnection, config: Config, state: ServerState, app_state: dict[str, Any]) -> None:
        super().__init__(config, state, app_state, owner.loop)
        self.owner = owner
        self.num_open = 0
        """Messages that have begun and whose body or response is not complete; each counts twice."""
        self.num_head_bytes = 0
        self.is_head = False
        self.is_reading = False

    @property
    def only_reads(self) -> bool:
        """Whether every open message is a complete GET or HEAD."""
        return self.num_open > 0 and not self.is_reading and self.scope["method"] in ("GET", "HEAD")

    def on_message_begin(self) -> None:
        self.num_open += 2
        self.num_head_bytes = 0
        self.is_head = self.is_reading = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        if b"#" in url:  # RFC 9112 3.2: a target has no fragment; another parser could see another path
            raise httptools.HttpParserError("the target has a fragment")
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self.is_head:  # a trailer is not a header: it must not change the head
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self.is_head = False
        if not is_sound(self.parser.get_http_version(), self.headers):
            raise httptools.HttpParserError("the head is not valid")
        super().on_headers_complete()

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

    def _count(self, size: int) -> None:
        self.num_head_bytes += size
        if self.num_head_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError("the head is too long")

    def _closed_one(self) -> None:
        self.num_open -= 1
        if self.num_open == 0:
            self.owner.cold_is_done()
