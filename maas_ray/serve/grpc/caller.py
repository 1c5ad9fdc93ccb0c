"""Metadata of a call: request id, deadline and options of the client. Independent of methods."""

import asyncio
import math
from typing import Any, NamedTuple

from maas_ray.errors import BadRequest
from maas_ray.serve.request.head import new_request_id
from maas_ray.serve.request.limits import is_request_id
from maas_ray.serve.wire.tensors import short


class Caller(NamedTuple):
    """Metadata of a call."""

    request_id: bytes
    """Request id for the response."""
    deadline: float
    """Time on the loop's clock after which the response is not wanted; infinity if not set."""
    traceparent: bytes = b""
    wants_status: bool = False
    """Whether an error inside a stream must end it with a status (Triton: metadata `triton_grpc_error`)."""

    def deadline_within(self, timeout_s: float) -> float:
        """Returns the deadline of a request that starts now, at most `timeout_s` seconds from now."""
        return min(self.deadline, asyncio.get_running_loop().time() + timeout_s)


def read_caller(context: Any) -> Caller:
    """Returns the metadata of a call.

    Args:
        context: context of grpc.aio, or Ray Serve's equivalent.
    """
    metadata: dict[str, str] = dict(context.invocation_metadata() or ())
    given = (metadata.get("x-request-id") or metadata.get("request_id") or "").encode()
    remaining = getattr(context, "time_remaining", None)  # Serve's context has none: its proxy enforces the deadline
    remaining_s = remaining() if remaining is not None else None
    return Caller(
        request_id=given if is_request_id(given) else new_request_id(),
        deadline=math.inf if remaining_s is None else asyncio.get_running_loop().time() + remaining_s,
        traceparent=metadata.get("traceparent", "").encode(),
        wants_status=metadata.get("triton_grpc_error", "").lower() == "true",
    )


def read_version(text: str) -> int | None:
    """Returns the version in a message; an empty one means the version of the model's alias.

    Raises:
        BadRequest: it is not a positive integer.
    """
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and int(text) > 0):
        raise BadRequest(f"version {short(text)} is not a positive integer; RepositoryIndex lists the versions")
    return int(text)
