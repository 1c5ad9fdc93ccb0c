"""Compressed bodies: decompression with a limit, and compression of responses. Uses two HTTP headers, nothing else of
HTTP.

`gzip` is RFC 1952 with one member. `deflate` is the zlib format (RFC 1950), as RFC 9110 says; the raw stream
(RFC 1951), which some clients send under that name, is accepted as well.
"""

import zlib

from maas_ray.errors import BadRequest, BodyTooLarge

MIN_BYTES = 1024
"""Smaller responses are not compressed: they fit into one packet anyway."""
LEVEL = 1
"""Tensors hardly compress, so the cheapest level: its time delays this client and all that wait after it."""

_STEP = 1 << 15
_GZIP, _ZLIB, _RAW = 31, 15, -15
_NAMES = {b"gzip": b"gzip", b"x-gzip": b"gzip", b"deflate": b"deflate", b"identity": b"identity", b"": b"identity"}


def inflate(body: bytes | memoryview, encoding: bytes, max_bytes: int) -> bytes:
    """Returns the body without its content encoding.

    Args:
        body: body as received.
        encoding: value of the header `content-encoding`.
        max_bytes: maximum size of the decompressed body; not much more is ever allocated.

    Raises:
        BadRequest: an unsupported encoding or more than one, damaged or truncated data, or trailing bytes.
        BodyTooLarge: the decompressed body would exceed `max_bytes`.
    """
    name = _NAMES.get(encoding.strip().lower())
    if name is None:
        shown = encoding[:40].decode("latin-1")
        reason = "only one encoding is supported" if b"," in encoding else "it is not supported"
        raise BadRequest(f"content-encoding {shown!r}: {reason}; send gzip, deflate or identity")
    if name == b"identity":
        if len(body) > max_bytes:
            raise BodyTooLarge(f"the body has {len(body)} bytes, the limit is {max_bytes}; send fewer rows per request")
        return bytes(body)
    view = memoryview(body)
    stream = zlib.decompressobj(_GZIP if name == b"gzip" else _ZLIB if _is_zlib(view) else _RAW)
    parts: list[bytes] = []
    total = offset = 0
    waiting: bytes | memoryview = b""
    while not stream.eof:
        if not waiting:
            waiting = view[offset : offset + _STEP]
            offset += _STEP
        try:
            part = stream.decompress(waiting, _STEP)
        except zlib.error as error:
            raise BadRequest(f"the body is not {name.decode()}: {_reason(error)}") from None
        if not part and not waiting:  # all input was read and all output was returned
            raise BadRequest(f"the {name.decode()} data of the body is truncated: it has no end mark")
        total += len(part)
        if total > max_bytes:
            raise BodyTooLarge(
                f"the decompressed body exceeds the limit of {max_bytes} bytes; send fewer rows per request"
            )
        parts.append(part)
        waiting = stream.unconsumed_tail
    if stream.unused_data or offset < len(view):
        raise BadRequest(f"bytes follow the end of the {name.decode()} data; send one member and nothing after it")
    return b"".join(parts)


def deflate(body: bytes, accept_encoding: bytes) -> tuple[bytes, bytes | None]:
    """Returns the body in an encoding that the client accepts.

    Args:
        body: body of a response.
        accept_encoding: value of the header `accept-encoding`; at equal quality gzip is preferred to deflate.

    Returns:
        The body and the name of its encoding, or None if it is not encoded.
    """
    if len(body) < MIN_BYTES:
        return body, None
    name = _choose(accept_encoding)
    if name is None:
        return body, None
    stream = zlib.compressobj(LEVEL, wbits=_GZIP if name == b"gzip" else _ZLIB)
    return stream.compress(body) + stream.flush(), name


def _is_zlib(view: memoryview) -> bool:
    """Whether there is a zlib header of two bytes (RFC 1950, 2.2); a raw stream rarely starts with it by chance."""
    return len(view) >= 2 and view[0] & 0x0F == 8 and (view[0] << 8 | view[1]) % 31 == 0


def _choose(accept_encoding: bytes) -> bytes | None:
    qualities: dict[bytes, float] = {}
    for item in accept_encoding[:1024].lower().split(b","):
        name, _, rest = item.partition(b";")
        qualities[_NAMES.get(name.strip(), name.strip())] = _quality(rest)
    anything = qualities.get(b"*", 0.0)
    best = max((b"gzip", b"deflate"), key=lambda name: qualities.get(name, anything))
    quality = qualities.get(best, anything)
    # RFC 9110, 12.5.3: identity is acceptable unless it is excluded, and preferred only if the header says so.
    return best if quality > 0 and quality >= qualities.get(b"identity", 0.0) else None


def _quality(parameters: bytes) -> float:
    for parameter in parameters.split(b";"):
        name, _, value = parameter.partition(b"=")
        if name.strip() == b"q":
            try:
                quality = float(value)
            except ValueError:
                return 0.0
            return quality if 0.0 <= quality <= 1.0 else 0.0
    return 1.0


def _reason(error: zlib.error) -> str:
    """Returns the error text without the number and the words that zlib puts before it."""
    return str(error).rsplit(": ", 1)[-1]
