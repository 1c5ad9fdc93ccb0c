"""Limits of one request that several transports check, each with its error."""

from maas_ray.errors import BodyTooLarge

MAX_CONTROL_BYTES = 64 << 10
"""Maximum body of a request that is not an inference; it is parsed on the loop."""
MAX_REQUEST_ID_CHARS = 128


def check_size(size: int, limit: int) -> None:
    """Raises `BodyTooLarge` for a body or message of at least `size` bytes if they exceed the limit."""
    if size > limit:
        raise too_large(size, limit)


def too_large(size: int, limit: int) -> BodyTooLarge:
    """Returns the error for a body that has at least `size` bytes."""
    return BodyTooLarge(f"the body has at least {size} bytes, the limit is {limit}; send fewer rows per request")


def late_body(num_bytes: int) -> str:
    """Returns the message for a body of which only `num_bytes` bytes arrived before the deadline."""
    return f"only {num_bytes} bytes of the body arrived before the request's deadline; send faster or allow more time"


def is_request_id(given: bytes) -> bool:
    """Whether a client's request id may be used: 1 to `MAX_REQUEST_ID_CHARS` visible ASCII characters."""
    return 0 < len(given) <= MAX_REQUEST_ID_CHARS and all(33 <= byte <= 126 for byte in given)
