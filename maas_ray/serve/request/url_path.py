"""Request paths: splits a path as it was sent, and only then decodes its segments.

A path that is decoded first has slashes that its sender did not write as slashes: `/v2%2frepository/index` would pass
the path filter of a proxy and become `/v2/repository/index` here.
"""

import re
from urllib.parse import quote, unquote_to_bytes

MAX_SEGMENTS = 8
"""Maximum number of segments of any route."""
_SEGMENT = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|%[0-9A-Fa-f]{2})+")
"""RFC 3986 3.3."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def split_path(path: str) -> list[str]:
    """Returns the segments of a path, still percent-encoded.

    Args:
        path: path without a query, percent-encoded as it was sent.

    Returns:
        Empty if the path is invalid: no leading slash, an empty segment (two slashes, or a trailing slash), `.` or
        `..`, a character that is not allowed in a path, or more segments than any route has.
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
    """Returns the model name in a segment, percent-decoded (RFC 3986 2.1); empty if it is not a valid name.

    Names are plain ASCII words (`registry.models`), so decoding before or after this cannot change which model they
    name.
    """
    name = unquote_to_bytes(segment).decode("latin-1") if "%" in segment else segment
    return name if _NAME.fullmatch(name) else ""


def below(base: str, path: str) -> str:
    """Returns the path below a base path; empty if it is not below it.

    Args:
        base: base path without a trailing slash; empty: every path is below it.
        path: as for `split_path`; the base is compared as it was sent, as HAProxy does.
    """
    if not base:
        return path
    return path[len(base) :] if path.startswith(f"{base}/") else ""


def sent_path(raw_path: bytes | None, path: str) -> str:
    """Returns the path as it was sent, from the scope of an ASGI server.

    Args:
        raw_path: raw path of the scope; optional in ASGI.
        path: path of the scope, already decoded.
    """
    return quote(path) if raw_path is None else raw_path.decode("latin-1")
