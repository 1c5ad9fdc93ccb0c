"""Bytes of responses. Their beginnings are cached, since the responses of a model begin alike."""

import asyncio
from collections.abc import Iterable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

from maas_ray.serve.request.head import Header
from maas_ray.serve.request.response import Reply

MAX_CACHED = 1024
"""Maximum number of cached beginnings; above it the cache is cleared."""
COPY_BYTES = 64 << 10
"""A larger body is passed to the transport as it is, not copied behind its head."""


class ResponseWriter:
    """Writes the responses of all connections of one server."""

    def __init__(self) -> None:
        self._starts: dict[tuple[int, tuple[Header, ...]], bytes] = {}
        """Beginnings of responses, up to the request id."""
        self._default_headers: Iterable[Header] = ()
        """Headers that uvicorn adds to each response; a new list each second, with the new date."""
        self._date = b""

    def write(
        self,
        transport: asyncio.Transport,
        reply: Reply,
        request_id: bytes,
        default_headers: Iterable[Header],
        closes: bool,
    ) -> bool:
        """Writes a response; returns whether the connection must be closed after it.

        Args:
            transport: transport of the connection.
            reply: the response.
            request_id: request id of the response.
            default_headers: uvicorn's current list of headers.
            closes: whether the connection ends with this response, whatever it is.
        """
        status, headers, body = reply
        if default_headers is not self._default_headers:
            self._renew_date(default_headers)
        start = self._starts.get((status, headers)) or self._start(status, headers)
        size = len(body)
        ending = b"connection: close\r\n\r\n" if closes else b"\r\n"
        if size < COPY_BYTES:
            transport.write(b"%b%b\r\ncontent-length: %d\r\n%b%b" % (start, request_id, size, ending, body))
        else:
            head = b"%b%b\r\ncontent-length: %d\r\n%b" % (start, request_id, size, ending)
            transport.writelines((head, body))
        return closes or (status >= 400 and (b"connection", b"close") in headers)

    def _start(self, status: int, headers: tuple[Header, ...]) -> bytes:
        lines = [STATUS_LINE[status], *(b"%b: %b\r\n" % header for header in headers), self._date, b"x-request-id: "]
        start = b"".join(lines)
        if len(self._starts) >= MAX_CACHED:
            self._starts.clear()
        self._starts[status, headers] = start
        return start

    def _renew_date(self, default_headers: Iterable[Header]) -> None:
        self._default_headers = default_headers
        self._starts.clear()
        self._date = b"".join(b"%b: %b\r\n" % header for header in default_headers if header[0] == b"date")
