"""Request head: validates path and headers once, in one order, in every front.

`LAYERS` is that order. A head with an invalid or unsupported option is refused here, before a byte of the body is read;
then the front reads the body, and the handler answers. Independent of sockets and models.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from maas_ray.errors import BadRequest, MethodNotAllowed, NotFound
from maas_ray.serve.request import unsupported_extensions
from maas_ray.serve.request.limits import check_size, is_request_id
from maas_ray.serve.request.url_path import decode_name, split_path
from maas_ray.serve.spec import cors
from maas_ray.serve.spec.limits import LimitsSpec
from maas_ray.serve.wire.binary import read_header_length

Header = tuple[bytes, bytes]

ENCODINGS = frozenset({b"identity", b"gzip", b"deflate"})
_SINGLE = frozenset(
    {b"content-length", b"content-encoding", b"inference-header-content-length", b"x-request-timeout-ms", b"host"}
)
"""Headers with a meaning for this server; a repeated one would be ambiguous."""


class Route(NamedTuple):
    """Target of a path."""

    name: str
    """`live`, `ready`, `server`, `models`, `model`, `model_ready`, `config`, `versions`, `stats`, `metrics`, `infer`,
    `index`, `load`, `unload`, `generate`, `generate_stream`, `preflight`, or `nothing` (for an extension that has an
    empty response here)."""
    method: str
    """Its method; HEAD is also accepted if it is GET."""
    model: str = ""
    version: int | None = None


class Head:
    """Head of one request. A front that receives the same bytes again may reuse the object.

    Args:
        method: method in upper case.
        path: path below the pool's base path, percent-encoded as it was sent.
        headers: header names in lower case, and values.
    """

    __slots__ = (
        "accept_encoding",
        "closes",
        "content_encoding",
        "content_length",
        "cors",
        "expects_continue",
        "given_id",
        "header_length",
        "headers",
        "method",
        "path",
        "reply_headers",
        "route",
        "timeout_s",
        "traceparent",
    )  # fmt: skip

    def __init__(self, method: str, path: str, headers: Iterable[Header]) -> None:
        self.method = method
        self.path = path
        self.headers = list(headers)
        self.given_id = b""
        """The client's `x-request-id`, if it is valid."""
        self.route = Route("", "")
        self.timeout_s = 0.0
        self.content_length: int | None = None
        """Declared bytes of the body; None if it is chunked or there is none."""
        self.content_encoding = b"identity"
        self.accept_encoding = b""
        self.header_length: int | None = None
        """Bytes of the JSON before binary tensors; None: the body is JSON only."""
        self.traceparent = b""
        self.closes = False
        """Whether the connection is closed after the response."""
        self.expects_continue = False
        """Whether the client waits for status 100 before it sends the body."""
        self.reply_headers: tuple[Header, ...] = ()
        """Additional headers of an error response."""
        self.cors: tuple[Header, ...] = ()
        """Headers that allow the page of a browser to read the response."""


INFERENCE = frozenset({"infer", "generate", "generate_stream"})
"""Routes whose requests are run by a model."""

Layer = Callable[[Head, Mapping[bytes, bytes], LimitsSpec], None]


def request_id(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Reads the client's `x-request-id`; an invalid one is replaced. Every response has it."""
    given = headers.get(b"x-request-id", b"")
    if is_request_id(given):
        head.given_id = given
    head.traceparent = headers.get(b"traceparent", b"")
    head.expects_continue = headers.get(b"expect", b"").lower() == b"100-continue"


def cross_origin(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Sets the headers for allowed origins; a browser's preflight is a separate route."""
    if limits.cors_origins:
        head.cors = cors.headers_for(limits.cors_origins, headers.get(b"origin"))
        if head.cors and cors.is_preflight(head.method, headers):
            head.route = Route("preflight", "OPTIONS")


def route(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Finds the route of the path, and checks the method."""
    if head.route.name:
        return
    head.route = found = find_route(head.path)
    if head.method != found.method and not (head.method == "HEAD" and found.method == "GET"):
        head.reply_headers = ((b"allow", b"GET, HEAD" if found.method == "GET" else found.method.encode()),)
        raise MethodNotAllowed(f"{_short(head.method)} is not allowed here; use {found.method}")


def single_headers(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Refuses repeated headers that determine how the rest is read."""
    names = [name for name, _ in head.headers if name in _SINGLE]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise BadRequest(f"header {twice[0].decode()} occurs more than once; send it once")


def deadline(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Reads `x-request-timeout-ms`, limited by the pool's maximum; Serve's own timeout headers are ignored."""
    head.timeout_s = limits.timeout_s
    given = headers.get(b"x-request-timeout-ms")
    if given is not None:
        if not (given.isdigit() and len(given) <= 12 and int(given) > 0):
            raise BadRequest(f"x-request-timeout-ms {given[:40]!r} is not a positive integer; send milliseconds")
        head.timeout_s = min(limits.timeout_s, int(given) / 1000)


def body_limit(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Refuses a declared length above the pool's limit without reading the body."""
    declared = headers.get(b"content-length")
    if declared is None:
        return
    if not (declared.isdigit() and len(declared) <= 18):
        raise BadRequest(f"content-length {declared[:40]!r} is not a number of bytes")
    head.content_length = int(declared)
    check_size(head.content_length, limits.max_body_bytes)


def body_form(head: Head, headers: Mapping[bytes, bytes], limits: LimitsSpec) -> None:
    """Reads the encoding of the body, and the length of the JSON before its binary tensors."""
    head.content_encoding = headers.get(b"content-encoding", b"identity").lower()
    if head.content_encoding not in ENCODINGS:
        raise BadRequest(f"content-encoding {head.content_encoding[:40]!r} is not supported; use gzip, deflate or none")
    head.accept_encoding = headers.get(b"accept-encoding", b"")
    length = headers.get(b"inference-header-content-length")
    if length is not None:
        head.header_length = read_header_length(length)


LAYERS: tuple[Layer, ...] = (request_id, cross_origin, route, single_headers, deadline, body_limit, body_form)
"""Order of the checks. They are followed by the body (front), decompression, tensors and queue (handler)."""


def read_head(head: Head, limits: LimitsSpec) -> None:
    """Passes a head through the layers.

    Raises:
        RequestError: refused; send `head.reply_headers` with the response.
        NotFound: there is no such path.
    """
    headers = dict(head.headers)
    for layer in LAYERS:
        layer(head, headers, limits)


def find_route(path: str) -> Route:
    """Returns the route of a path below the pool's base path.

    The segments of a route are compared as they were sent, so that a path filter in front sees the same path; only the
    name of a model is decoded.

    Args:
        path: path, percent-encoded as it was sent.

    Raises:
        NotFound: there is no such path.
        BadRequest: the version is not a positive integer.
    """
    match split_path(path):
        case ["v2", "systemsharedmemory" | "cudasharedmemory" | "logging", *_]:
            return _extension_route(path)
        case ["v2", *_, "trace", "setting"]:
            return _extension_route(path)
        case ["v2"]:
            return Route("server", "GET")
        case ["v2", "health", "live" | "ready" as what]:
            return Route(what, "GET")
        case ["metrics"]:
            return Route("metrics", "GET")
        case ["v2", "models"]:
            return Route("models", "GET")
        case ["v2", "models", "stats"]:
            return Route("stats", "GET")
        case ["v2", "repository", "index"]:
            return Route("index", "POST")
        case ["v2", "repository", "models", segment, "load" | "unload" as what] if model := decode_name(segment):
            return Route(what, "POST", model)
        case ["v2", "models", segment, *rest] if model := decode_name(segment):
            return _model_route(path, model, rest)
    raise NotFound(f"no path {_short(path)}; the protocol's paths begin with v2, those of models with v2/models")


_PREFIX = os.urandom(8).hex().encode()
_COUNT = itertools.count(int.from_bytes(os.urandom(3), "big"))


def new_request_id() -> bytes:
    """Returns an id that no other replica generates: random digits of this process, and a counter."""
    return b"%b%016x" % (_PREFIX, next(_COUNT))


def _extension_route(path: str) -> Route:
    found = unsupported_extensions.find(path.strip("/"))
    if found is None:
        raise NotFound(f"no path {_short(path)}; the protocol's paths begin with v2, those of models with v2/models")
    method, extension, kind = found
    if kind == "refused":
        raise unsupported_extensions.refusal(extension)
    return Route("nothing", method)


def _model_route(path: str, model: str, rest: list[str]) -> Route:
    version: int | None = None
    if len(rest) >= 2 and rest[0] == "versions" and rest[1].isalnum():
        version = _version(rest[1])
        rest = rest[2:]
    match rest:
        case []:
            return Route("model", "GET", model, version)
        case ["versions"]:
            return Route("versions", "GET", model)
        case ["ready"]:
            return Route("model_ready", "GET", model, version)
        case ["config" | "stats" as what]:
            return Route(what, "GET", model, version)
        case ["infer" | "generate" | "generate_stream" as what]:
            return Route(what, "POST", model, version)
    raise NotFound(f"no path {_short(path)}; the paths of a model are versions, ready, config, stats and infer")


def _version(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise BadRequest(f"version {_short(text)} is not a positive integer; GET v2/models/M lists the versions")
    return int(text)


def _short(value: str) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
