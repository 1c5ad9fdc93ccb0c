"""uvicorn's HTTP protocol with our limits and validity checks of request heads, for the classes that derive from it."""

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from maas_ray.serve.http.raw_head import MAX_HEAD_BYTES, is_sound


class CheckedHttpProtocol(HttpToolsProtocol):
    """Refuses heads that are too long or ambiguous; trailers do not change the head."""

    _num_head_bytes = 0
    _is_head = False

    def on_message_begin(self) -> None:
        self._num_head_bytes = 0
        self._is_head = True
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count(len(name) + len(value) + 4)
        if self._is_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._is_head = False
        if not is_sound(self.parser.get_http_version(), self.headers):
            raise httptools.HttpParserError("the head is not valid")
        self.on_head_accepted()
        super().on_headers_complete()

    def on_head_accepted(self) -> None:
        """Called when a head is complete and valid, before the request begins."""

    def _count(self, size: int) -> None:
        self._num_head_bytes += size
        if self._num_head_bytes > MAX_HEAD_BYTES:
            raise httptools.HttpParserError("the head is too long")
