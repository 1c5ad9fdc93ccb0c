"""One HTTP/1.1 connection on a raw asyncio protocol: as little of our own work per request as Python allows."""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_HEADER_LENGTH = re.compile(rb"\r\ninference-header-content-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(slots=True)
class Answer:
    """One answer; status 0: the connection broke before there was one."""

    status: int
    head: bytes
    body: bytes

    @property
    def header_length(self) -> int | None:
        """Bytes of the JSON header of a binary answer."""
        found = _HEADER_LENGTH.search(self.head)
        return int(found[1]) if found else None


class Connection(asyncio.Protocol):
    """Sends one request at a time; `on_answer` gets each answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.on_answer: Callable[[Answer], None] | None = None
        self.is_open = False
        self._buffer = b""
        self._wanted = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.is_open = True

    def send(self, request: bytes, on_answer: Callable[[Answer], None]) -> None:
        """Sends whole bytes of a request."""
        assert self.transport is not None
        self.on_answer = on_answer
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer = self._buffer + data if self._buffer else data
        if len(self._buffer) < self._wanted:
            return
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._buffer[:end]
        if found := _LENGTH.search(head):
            self._wanted = end + 4 + int(found[1])
            if len(self._buffer) < self._wanted:
                return
            body = self._buffer[end + 4 : self._wanted]
        elif _CHUNKED.search(head):
            if not self._buffer.endswith(b"0\r\n\r\n"):
                return
            body = _join(self._buffer[end + 4 :])
        else:
            body = b""
        self._buffer, self._wanted = b"", 0
        if _CLOSE.search(head):
            self.is_open = False
            if self.transport is not None:
                self.transport.close()
        self._answer(Answer(int(head[9:12]), head, body))

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._answer(Answer(0, b"", b""))

    def _answer(self, answer: Answer) -> None:
        on_answer, self.on_answer = self.on_answer, None
        if on_answer is not None:
            on_answer(answer)


def make_request(
    host: str,
    port: int,
    path: str,
    body: bytes,
    header_length: int | None = None,
    more: Mapping[str, str] | None = None,
) -> bytes:
    """Bytes of one request; `more` are further headers."""
    kind = "application/json" if header_length is None else "application/octet-stream"
    headers = {} if header_length is None else {"inference-header-content-length": str(header_length)}
    extra = "".join(f"{name}: {value}\r\n" for name, value in {**headers, **(more or {})}.items())
    head = f"POST {path} HTTP/1.1\r\nhost: {host}:{port}\r\ncontent-type: {kind}\r\n{extra}content-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def _join(chunks: bytes) -> bytes:
    body = b""
    while chunks:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size.split(b";")[0], 16)
        body += rest[:length]
        chunks = rest[length + 2 :] if length else b""
    return body
