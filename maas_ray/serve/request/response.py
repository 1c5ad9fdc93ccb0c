"""What goes back over HTTP, and how an error looks there. Knows no model and no socket."""

from typing import NamedTuple

from maas_ray.errors import BodyTooLarge, DeadlineExceeded, MaasError, Overloaded
from maas_ray.serve.request.head import Header
from maas_ray.serve.wire import v2

JSON: Header = (b"content-type", b"application/json")
BINARY: Header = (b"content-type", b"application/octet-stream")


class Reply(NamedTuple):
    """What goes back: status, headers (lower case) and body."""

    status: int
    headers: tuple[Header, ...]
    body: bytes


def internal_error(request_id: bytes) -> MaasError:
    """A failure that only the log may describe."""
    return MaasError(f"internal error; the replica's log has the cause under request id {request_id.decode()}")


def error_reply(error: MaasError, headers: tuple[Header, ...] = ()) -> Reply:
    """The protocol's form of an error: its class gives the status, `Overloaded` also the Retry-After header."""
    extra: tuple[Header, ...] = ()
    if isinstance(error, Overloaded):
        extra = ((b"retry-after", str(max(1, round(error.retry_after_s + 0.5))).encode()),)
    elif isinstance(error, DeadlineExceeded):
        extra = ((b"retry-after", b"1"),)
    elif isinstance(error, BodyTooLarge):
        extra = ((b"connection", b"close"),)  # what is left of the body is not worth reading
    return Reply(error.http_status, (JSON, *headers, *extra), v2.write_error(str(error)))
