"""HAProxy's own error responses, as JSON. Independent of the configuration."""

import json
from pathlib import Path

from maas_ray.process.private_files import write_private

HEADER_TIMEOUT_S = 8
"""Time limit for the headers of a request and the part of its body that fits into a buffer."""

NO_REPLICA = (
    "no replica answered; the request was not repeated because no other replica was free, its body is too large to "
    "be kept, or its pool is not idempotent; retry if that is safe"
)
STARTING = "the HTTP front is starting, or no pool has been deployed yet; retry"
MISSING = "no pool is served at this path; GET /-/routes lists the paths"

_TEXTS = {
    400: "the request is not valid HTTP, its headers are too long, or it was aborted",
    401: "the request is not authorized",
    403: "the request is forbidden",
    404: MISSING,
    405: "the method is not allowed",
    407: "the request is not authorized",
    408: f"the request did not arrive within {HEADER_TIMEOUT_S} s",
    410: "this path is no longer served",
    413: "the request is too large",
    421: "the request was sent to the wrong server",
    422: "the request cannot be processed",
    425: "the request came too early",
    429: "too many requests",
    500: "the HTTP front failed",
    501: "the request needs a feature that is not implemented",
    502: "the replica did not answer in full",
    503: "no replica is available; retry",
    504: "the replica did not answer in time",
}
"""Texts of each status with a built-in page in HAProxy, short enough to fit in place of that page."""

_FILES = {
    502: (503, NO_REPLICA, "Retry-After: 1\r\n"),  # for a client, a replica that died is a reason to retry
    503: (503, NO_REPLICA, "Retry-After: 1\r\n"),
    504: (504, _TEXTS[504], ""),
    **{status: (status, _TEXTS[status], "Connection: close\r\n") for status in (400, 408, 413)},
    500: (500, _TEXTS[500], ""),
}
_REASONS = {400: "Bad Request", 408: "Request Timeout", 413: "Content Too Large", 500: "Internal Server Error", 503: "Service Unavailable", 504: "Gateway Timeout"}  # fmt: skip


def error(text: str) -> str:
    """Returns the JSON document of an error."""
    return json.dumps({"error": text}, ensure_ascii=True, separators=(",", ":"))


def write_error_files(directory: Path) -> dict[int, Path]:
    """Writes the files that replace HAProxy's responses; returns the file of each status."""
    files = {}
    for status, (shown, text, extra) in _FILES.items():
        body = error(text)
        head = (
            f"HTTP/1.1 {shown} {_REASONS[shown]}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        files[status] = directory / f"{status}.http"
        write_private(files[status], f"{head}{extra}\r\n{body}")
    return files


def built_in_answer(status: int, reason: str, length: int) -> bytes | None:
    """Returns a response of exactly `length` bytes, padded with spaces after the document; None if it does not fit."""
    text = _TEXTS.get(status)
    if text is None:
        return None
    for words in (text, "refused"):
        body = error(words)
        start = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: "
        room = length - len(start) - len("\r\n\r\n")
        # The digits of the length are part of it.
        for digits in (2, 3):
            size = room - digits
            if len(body) <= size and len(str(size)) == digits:
                return f"{start}{size}\r\n\r\n{body.ljust(size)}".encode()
    return None
