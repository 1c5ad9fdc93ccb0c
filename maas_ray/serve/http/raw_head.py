"""Raw request heads: selects those that the protocol class may answer itself, and checks what the parser does not.

httptools parses; this module contains the additional requirements of RFC 9112. Independent of sockets and models.
"""

import re

import httptools

from maas_ray.serve.request.head import Head, Header
from maas_ray.serve.request.url_path import below

MAX_HEAD_BYTES = 32 << 10

REQUEST_LINE = re.compile(rb"(?:\r\n)*[A-Z]{1,20} [!-~]+ HTTP/1\.[01]\r\n")
_LENGTH = re.compile(rb"\r\ncontent-length[ \t]*:[ \t]*(\d{1,18})[ \t]*\r\n", re.IGNORECASE)
_UPGRADE = re.compile(rb"\r\nupgrade[ \t]*:[^\r\n]*(?=\r\n)", re.IGNORECASE)
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%-]*|\[[0-9A-Fa-f:.]+\])(?::\d{0,5})?")


def parse_head(raw: bytes, base_path: str) -> Head | None:
    """Returns a head that may be answered here; None for everything that uvicorn's protocol must handle or refuse."""
    collector = _Collector()
    parser = httptools.HttpRequestParser(collector)
    try:
        parser.feed_data(raw)
        url = httptools.parse_url(collector.url)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade, httptools.HttpParserInvalidURLError, ValueError):
        return None
    is_plain = collector.is_complete and parser.get_method() == b"POST" and parser.get_http_version() == "1.1"
    if not is_plain or parser.should_upgrade() or any(name == b"transfer-encoding" for name, _ in collector.headers):
        return None
    if not is_sound("1.1", collector.headers) or b"#" in collector.url:
        return None
    path = below(base_path, (url.path or b"").decode("latin-1"))
    if not path:
        return None
    head = Head("POST", path, collector.headers)
    head.closes = not parser.should_keep_alive()
    return head


def is_sound(version: str, headers: list[Header]) -> bool:
    """Checks RFC 9112 3.2 and 6.1, which the parser does not: exactly one Host, and no chunks in HTTP/1.0."""
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or not all(map(_HOST.fullmatch, hosts)):
        return False
    if version == "1.1":
        return len(hosts) == 1
    return version == "1.0" and not any(name == b"transfer-encoding" for name, _ in headers)


def declared_length(raw: bytes) -> int | None:
    """Returns the bytes of the body after a head if they are unambiguous."""
    lower = raw.lower()
    if b"\r\ntransfer-encoding" in lower:
        return None
    found = _LENGTH.findall(raw)
    if lower.count(b"\ncontent-length") != len(found) or len(found) > 1:
        return None
    return int(found[0]) if found else 0


def is_hopeless(data: bytes) -> bool:
    """Whether the beginning of a head cannot become that of a request."""
    return b"\n\n" in data or (b"\n" in data.lstrip(b"\r\n") and not REQUEST_LINE.match(data))


def refusal(data: bytes, end: int) -> tuple[int, str] | None:
    """Returns the status and the message for a complete head that no parser should read; None if one may.

    Args:
        data: bytes that begin with the head.
        end: bytes of the head.
    """
    if end > MAX_HEAD_BYTES:
        return 431, f"the head has {end} bytes, the limit is {MAX_HEAD_BYTES}; send fewer or shorter headers"
    if not REQUEST_LINE.match(data):
        return 400, "the first line is not a request line of HTTP/1.1 or HTTP/1.0"
    return None


def without_upgrade(raw: bytes) -> bytes:
    """Returns a head without its upgrade to another protocol, which is ignored as RFC 9110 7.8 allows."""
    return _UPGRADE.sub(b"", raw)


class _Collector:
    """Collects the fields that httptools finds in a head."""

    __slots__ = ("headers", "is_complete", "url")

    def __init__(self) -> None:
        self.url = b""
        self.headers: list[Header] = []
        self.is_complete = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.is_complete = True
