"""One HTTP/1.1 connection on a raw asyncio protocol: as little of our own work per request as Python allows."""

import asyncio
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_LENGTH = b"\r\ncontent-length:"
_HEADER_LENGTH = re.compile(rb"\r\ninference-header-content-length: *(\d+)", re.IGNORECASE)
_CHUNKED = re.compile(rb"\r\ntransfer-encoding: *chunked")
_CLOSE = b"\r\nconnection: close"


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


NO_ANSWER = Answer(0, b"", b"")


def read_answer(data: bytes) -> tuple[Answer, bool] | None:
    """The answer that these bytes are, and whether the server closes after it; None while it is not complete."""
    end = data.find(b"\r\n\r\n")
    if end < 0:
        return None
    head = data[:end]
    lower = head.lower()
    at = lower.find(_LENGTH)
    if at >= 0:
        stop = lower.find(b"\r", at + 2)
        wanted = end + 4 + int(lower[at + len(_LENGTH) : stop if stop >= 0 else end])
        if len(data) < wanted:
            return None
        body = data[end + 4 : wanted]
    elif _CHUNKED.search(lower):
        if not data.endswith(b"0\r\n\r\n"):
            return None
        body = _join(data[end + 4 :])
    else:
        body = b""
    return Answer(int(head[9:12]), head, body), _CLOSE in lower


class Connection(asyncio.Protocol):
    """Sends one request at a time; `on_answer` gets each answer."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.on_answer: Callable[[Answer], None] | None = None
        self.is_open = False
        self._buffer = b""

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
        if found := read_answer(self._buffer):
            answer, closes = found
            self._buffer = b""
            if closes:
                self.is_open = False
                if self.transport is not None:
                    self.transport.close()
            self._answer(answer)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._answer(NO_ANSWER)

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
