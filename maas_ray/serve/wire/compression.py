"""Compressed bodies: inflation that ends at a limit, and compression of answers. Knows no HTTP beyond two headers.

`gzip` is RFC 1952 with one member. `deflate` is the zlib format (RFC 1950), as RFC 9110 says; the raw stream
(RFC 1951), which some clients send under that name, is taken as well.
"""

import zlib

from maas_ray.errors import BadRequest, BodyTooLarge

MIN_BYTES = 1024
"""Smaller answers go out as they are: they fit into one packet anyway."""
LEVEL = 1
"""Tensors hardly compress, so the cheapest level; the time is the caller's and that of everybody behind him."""

_STEP = 1 << 15
_GZIP, _ZLIB, _RAW = 31, 15, -15
_NAMES = {b"gzip": b"gzip", b"x-gzip": b"gzip", b"deflate": b"deflate", b"identity": b"identity", b"": b"identity"}


def inflate(body: bytes | memoryview, encoding: bytes, max_bytes: int) -> bytes:
    """The body without its content encoding.

    Args:
        body: as received.
        encoding: value of the header `content-encoding`.
        max_bytes: the most that the inflated body may have; not much more is ever allocated.

    Raises:
        BadRequest: an encoding that is not offered or more than one, damaged or truncated data, or something behind it.
        BodyTooLarge: more than `max_bytes` would come out.
    """
    name = _NAMES.get(encoding.strip().lower())
    if name is None:
        shown = encoding[:40].decode("latin-1")
        reason = "one encoding at most is taken" if b"," in encoding else "it is not offered"
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
        if not part and not waiting:  # all was read, and all that it held has come out
            raise BadRequest(f"the {name.decode()} data of the body ends before its end mark: it is truncated")
        total += len(part)
        if total > max_bytes:
            raise BodyTooLarge(
                f"the body inflates to more than {max_bytes} bytes, which is the limit; send fewer rows per request"
            )
        parts.append(part)
        waiting = stream.unconsumed_tail
    if stream.unused_data or offset < len(view):
        raise BadRequest(f"bytes follow the end of the {name.decode()} data; send one member and nothing behind it")
    return b"".join(parts)


def deflate(body: bytes, accept_encoding: bytes) -> tuple[bytes, bytes | None]:
    """The body as the client wants it.

    Args:
        body: an answer.
        accept_encoding: value of the header `accept-encoding`; gzip is taken before deflate at the same quality.

    Returns:
        The body and the name of its encoding, or None where it goes out as it is.
    """
    if len(body) < MIN_BYTES:
        return body, None
    name = _choose(accept_encoding)
    if name is None:
        return body, None
    stream = zlib.compressobj(LEVEL, wbits=_GZIP if name == b"gzip" else _ZLIB)
    return stream.compress(body) + stream.flush(), name


def _is_zlib(view: memoryview) -> bool:
    """Whether the two bytes of a zlib header are there (RFC 1950, 2.2); a raw stream that has them by chance is rare."""
    return len(view) >= 2 and view[0] & 0x0F == 8 and (view[0] << 8 | view[1]) % 31 == 0


def _choose(accept_encoding: bytes) -> bytes | None:
    qualities: dict[bytes, float] = {}
    for item in accept_encoding[:1024].lower().split(b","):
        name, _, rest = item.partition(b";")
        qualities[_NAMES.get(name.strip(), name.strip())] = _quality(rest)
    anything = qualities.get(b"*", 0.0)
    best = max((b"gzip", b"deflate"), key=lambda name: qualities.get(name, anything))
    quality = qualities.get(best, anything)
    # RFC 9110, 12.5.3: identity is acceptable unless it is excluded, and preferred only where it says so.
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
    """Without the number and the words that zlib puts before each."""
    return str(error).rsplit(": ", 1)[-1]
