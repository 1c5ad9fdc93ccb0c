"""Paths of requests: split as they were sent, and only then decoded, segment by segment. Knows no route.

A path that was decoded first has slashes that its sender did not write as such: `/v2%2frepository/index` would pass the
path filter of a front proxy and arrive here as `/v2/repository/index`.
"""

import re
from urllib.parse import quote, unquote_to_bytes

MAX_SEGMENTS = 8
"""No route has more."""
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+")
"""RFC 3986 3.3."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def split_path(path: str) -> list[str]:
    """The segments of a path, still percent-encoded.

    Args:
        path: percent-encoded, as it was sent, without a query.

    Returns:
        Empty for what is no sequence of proper segments: no slash in front, an empty segment (two slashes, or one at the
        end), `.` or `..`, a character that a path cannot hold, more segments than any route has.
    """
    if not path.startswith("/"):
        return []
    segments = path.split("/", MAX_SEGMENTS + 1)[1:]
    if (
        len(segments) > MAX_SEGMENTS
        or not all(map(_SEGMENT.fullmatch, segments))
        or not {".", ".."}.isdisjoint(segments)
    ):
        return []
    return segments


def decode_name(segment: str) -> str:
    """The name of a model in a segment, without its percent-encoding (RFC 3986 2.1); empty if it is no such name.

    Names are plain ASCII words (`registry.models`), so that no decoding before or after this one changes what they name.
    """
    name = unquote_to_bytes(segment).decode("latin-1") if "%" in segment else segment
    return name if _NAME.fullmatch(name) else ""


def below(base: str, path: str) -> str:
    """The path below a base path; empty if it is not below it.

    Args:
        base: without a slash at the end; empty: everything is below it.
        path: as for `split_path`; the base is compared as it was sent, which is how HAProxy compares it.
    """
    if not base:
        return path
    return path[len(base) :] if path.startswith(f"{base}/") else ""


def sent_path(raw_path: bytes | None, path: str) -> str:
    """The path as it was sent, of what an ASGI server says of it.

    Args:
        raw_path: the scope's; optional in ASGI.
        path: the scope's, decoded already.
    """
    return quote(path) if raw_path is None else raw_path.decode("latin-1")
