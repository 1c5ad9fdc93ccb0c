"""Triton extensions that are not supported: their paths, their RPCs, and the errors with alternatives.

Sources: triton-inference-server/server, docs/protocol/extension_{shared_memory,trace,logging}.md. Clients request the
list of shared memory regions, and remove all regions, before they begin: both succeed with an empty response.
"""

import re
from typing import Literal

from maas_ray.errors import NotOffered

NOT_OFFERED = {
    "shared_memory": "shared memory is not supported: send the tensors in the request; binary ones are read without a copy",
    "trace": "the trace extension is not supported: set observability.tracing in the pool's spec to send spans to a collector",
    "logging": "the logging extension is not supported: set observability.access_log in the pool's spec",
}  # fmt: skip
"""Error texts with the alternative, by extension."""

Kind = Literal["nothing", "refused"]

_SHARED = r"v2/(?:system|cuda)sharedmemory"
_PATHS: tuple[tuple[re.Pattern[str], str, str, Kind], ...] = (
    (re.compile(rf"{_SHARED}(?:/region/[^/]+)?/status"), "GET", "shared_memory", "nothing"),
    (re.compile(rf"{_SHARED}(?:/region/[^/]+)?/unregister"), "POST", "shared_memory", "nothing"),
    (re.compile(rf"{_SHARED}/region/[^/]+/register"), "POST", "shared_memory", "refused"),
    (re.compile(r"v2/(?:models/[^/]+/)?trace/setting"), "", "trace", "refused"),
    (re.compile(r"v2/logging"), "", "logging", "refused"),
)

RPCS: dict[str, tuple[str, Kind]] = {
    **{
        f"{memory}SharedMemory{verb}": ("shared_memory", "refused" if verb == "Register" else "nothing")
        for memory in ("System", "Cuda")
        for verb in ("Status", "Register", "Unregister")
    },
    "TraceSetting": ("trace", "refused"),
    "LogSettings": ("logging", "refused"),
}
"""The same for gRPC, by method."""


def find(path: str) -> tuple[str, str, Kind] | None:
    """Returns the method of a path (empty: any), its extension, and whether it is refused or has an empty response."""
    for pattern, method, extension, kind in _PATHS:
        if pattern.fullmatch(path):
            return method, extension, kind
    return None


def refusal(extension: str) -> NotOffered:
    """Returns the error of an extension."""
    return NotOffered(NOT_OFFERED[extension])
