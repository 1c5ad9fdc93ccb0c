"""HTTP responses and the JSON form of errors. Independent of models and sockets."""

from typing import NamedTuple

from maas_ray.errors import BodyTooLarge, DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.request.head import Header
from maas_ray.serve.wire import v2

JSON: Header = (b"content-type", b"application/json")
BINARY: Header = (b"content-type", b"application/octet-stream")


class Reply(NamedTuple):
    """HTTP response: status, headers (lower case) and body."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


def internal_error(request_id: bytes) -> MaasError:
    """Returns the error for a failure that only the log may describe."""
    return MaasError(f"internal error; the replica's log has the cause under request id {request_id.decode()}")


def error_reply(error: MaasError, headers: tuple[Header, ...] = ()) -> Reply:
    """Returns the response of an error: its class determines the status, `Overloaded` adds the Retry-After header."""
    extra: tuple[Header, ...] = ()
    if isinstance(error, Overloaded):
        extra = ((b"retry-after", str(max(1, round(error.retry_after_s + 0.5))).encode()),)
    elif isinstance(error, DeadlineExceeded):
        extra = ((b"retry-after", b"1"),)
    elif isinstance(error, BodyTooLarge):
        extra = ((b"connection", b"close"),)  # the rest of the body is not read
    return Reply(error.http_status, (JSON, *headers, *extra), v2.write_error(str(error)))
