"""Cross-origin requests of browsers: allowed origins, response headers and preflight responses.

Source: the CORS protocol of fetch.spec.whatwg.org. Disabled unless a pool's spec lists origins. Independent of sockets
and models.
"""

import re
from collections.abc import Mapping, Sequence

Header = tuple[bytes, bytes]

ANY = "*"
_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(?:[a-z0-9._-]+|\[[0-9a-f:.]+\])(?::[0-9]{1,5})?")
_NAMES = re.compile(rb"[A-Za-z0-9!#$%&'*+.^_`|~-]+(?:[ \t]*,[ \t]*[A-Za-z0-9!#$%&'*+.^_`|~-]+){0,63}")
_EXPOSED = b"inference-header-content-length, retry-after, x-maas-run, x-maas-version, x-request-id"
_METHODS = b"GET, HEAD, POST"
_MAX_AGE_S = b"600"
"""Seconds for which a browser may cache a preflight response."""


def check_origin(origin: str) -> str:
    """Returns an origin as browsers send it; raises `ValueError` for any other string."""
    if origin != ANY and not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{origin!r} is not an origin: use scheme://host or scheme://host:port in lower case without a path, or '*'"
        )
    return origin


def headers_for(origins: Sequence[str], given: bytes | None) -> tuple[Header, ...]:
    """Returns the CORS headers of a response to this origin; empty if it is not allowed, or the client is no browser.

    Args:
        origins: allowed origins.
        given: value of the header `origin`.
    """
    if given is None:
        return ()
    if ANY in origins:
        return ((b"access-control-allow-origin", b"*"), (b"access-control-expose-headers", _EXPOSED))
    if given.decode("latin-1") not in origins:
        return ()
    return (
        (b"access-control-allow-origin", given),
        (b"vary", b"origin"),
        (b"access-control-expose-headers", _EXPOSED),
    )


def is_preflight(method: str, headers: Mapping[bytes, bytes]) -> bool:
    """Whether the request is a preflight of a browser."""
    return method == "OPTIONS" and b"access-control-request-method" in headers and b"origin" in headers


def preflight_headers(headers: Mapping[bytes, bytes]) -> tuple[Header, ...]:
    """Returns the headers of a preflight response: any header is allowed, and the methods of the protocol."""
    wanted = headers.get(b"access-control-request-headers", b"").strip()
    named = ((b"access-control-allow-headers", wanted),) if _NAMES.fullmatch(wanted) else ()
    return ((b"access-control-allow-methods", _METHODS), *named, (b"access-control-max-age", _MAX_AGE_S))
