"""Extensions of Triton's protocol that are not here: where clients ask for them, and what they hear. Knows no server.

Sources: triton-inference-server/server, docs/protocol/extension_{shared_memory,trace,logging}.md. Clients ask for the
regions of shared memory and remove all of them before they begin: there are none, which is a true answer to both.
"""

import re
from typing import Literal

from maas_ray.errors import NotOffered

NOT_OFFERED = {
    "shared_memory": "shared memory is not offered: send the tensors with the request, binary ones are read in place",
    "trace": "the trace extension is not offered: set observability.tracing in the pool's spec, which sends spans to a collector",
    "logging": "the logging extension is not offered: set observability.access_log in the pool's spec",
}  # fmt: skip
"""Why not, and the way out, by extension."""

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
"""The same over gRPC, by method."""


def find(path: str) -> tuple[str, str, Kind] | None:
    """The method that a path takes (empty: any), its extension, and whether there is nothing to tell or to refuse."""
    for pattern, method, extension, kind in _PATHS:
        if pattern.fullmatch(path):
            return method, extension, kind
    return None


def refusal(extension: str) -> NotOffered:
    """The error of an extension."""
    return NotOffered(NOT_OFFERED[extension])
