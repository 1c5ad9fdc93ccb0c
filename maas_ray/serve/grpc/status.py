"""gRPC status of errors: status code, message, and retry delay. Independent of servers and models."""

from typing import NamedTuple

import grpc

from maas_ray.errors import FilesRefused, MaasError, Overloaded
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.outcome import Refused

MAX_MESSAGE_BYTES = 1024
"""Maximum message size: all trailers together may have 8 KiB, and a non-ASCII byte becomes three there."""

_BY_HTTP_STATUS = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    409: grpc.StatusCode.ABORTED,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    415: grpc.StatusCode.INVALID_ARGUMENT,
    422: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    501: grpc.StatusCode.UNIMPLEMENTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

CODES = {code.value[0]: code for code in grpc.StatusCode}
_RETRY_METADATA = ("grpc-retry-pushback-ms", "grpc-status-details-bin")


class GrpcStatus(NamedTuple):
    """Error status of a call."""

    code: grpc.StatusCode
    message: str
    metadata: tuple[tuple[str, str | bytes], ...]
    """Trailing metadata: the retry delay, in the two forms that clients support."""


def status_of(error: MaasError) -> GrpcStatus:
    """Returns the status of an error, derived from its HTTP status, so that a new class of error needs no code here."""
    if isinstance(error, Refused):
        outcome = error.outcome
        trailing = tuple(item for item in outcome.trailing if item[0] in _RETRY_METADATA)
        return GrpcStatus(CODES[outcome.code], outcome.details, trailing)
    code = _BY_HTTP_STATUS.get(error.http_status, grpc.StatusCode.INTERNAL)
    if isinstance(error, FilesRefused):  # the status that Triton's clients expect for this refusal
        code = grpc.StatusCode.INTERNAL
    message = error_text(error)
    metadata = _retry_metadata(code, message, error.retry_after_s) if isinstance(error, Overloaded) else ()
    return GrpcStatus(code, message, metadata)


def error_text(error: MaasError) -> str:
    """Returns the message of an error, with a limited length."""
    text = str(error).encode("utf-8", "replace")
    if len(text) <= MAX_MESSAGE_BYTES:
        return text.decode()
    return text[: MAX_MESSAGE_BYTES - 3].decode("utf-8", "ignore") + "..."


def _retry_metadata(code: grpc.StatusCode, message: str, retry_after_s: float) -> tuple[tuple[str, str | bytes], ...]:
    """Returns `grpc-retry-pushback-ms` (gRFC A6, for gRPC's own retries) and `google.rpc.RetryInfo` (for clients)."""
    details = pb.Status(code=code.value[0], message=message)
    details.details.add(type_url="type.googleapis.com/google.rpc.RetryInfo").value = _retry_info(retry_after_s)
    pushback, status = _RETRY_METADATA
    return (pushback, str(int(retry_after_s * 1000))), (status, details.SerializeToString())


def _retry_info(retry_after_s: float) -> bytes:
    info = pb.RetryInfo()
    info.retry_delay.FromMilliseconds(int(retry_after_s * 1000))
    serialized: bytes = info.SerializeToString()
    return serialized
