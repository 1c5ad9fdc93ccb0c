"""Calls that name no pool where there are several: which pool serves their model, and the way there. Knows no Ray.

Any pool may receive such a call. It looks up who serves the model, and passes the call on, once, if that is another pool.
Nothing here tells a caller which pools there are.
"""

import asyncio
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import grpc

from maas_ray.errors import BadRequest, NotFound
from maas_ray.haproxy.names import UNNAMED_HEADER
from maas_ray.serve.grpc.codec import parse
from maas_ray.serve.grpc.outcome import CallOutcome
from maas_ray.serve.grpc.service import MAX_CONTROL_BYTES, QUESTIONS
from maas_ray.serve.request.head import too_large

APPLICATION = "application"
"""Metadata by which a caller names a pool."""
MAX_WAIT_S = 300.0
"""Longest wait for another pool where the caller has no deadline; one that sleeps takes its time to wake."""
MAX_NAME_BYTES = 4096
_LOAD = "RepositoryModelLoad"
_OF_A_POOL = frozenset({"RepositoryIndex", "ModelStatistics"})
"""Methods that speak of a whole pool unless a model is named."""
_OF_A_MODEL = frozenset({"ModelInfer", "ModelReady", "ModelMetadata", "ModelConfig", "RepositoryModelUnload", _LOAD})
ROUTED = _OF_A_MODEL | _OF_A_POOL
"""Methods whose answer depends on the pool. Every other one is the same in all of them."""
_WAY_OUT = f"send the name of the pool as the metadata {APPLICATION!r}"
_MAX_FIELDS = 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Served(NamedTuple):
    """What a pool serves."""

    names: Collection[str]
    """Models, in memory or not."""
    is_open: bool
    """Whether callers may load models, any of the registry."""


class Neighbors(Protocol):
    """The pools of the cluster."""

    async def pools(self) -> Mapping[str, Served]:
        """What each pool serves, this one too. Raises `Overloaded` if that cannot be read now."""
        ...

    async def call(
        self, pool: str, method: str, body: bytes, metadata: Mapping[str, str], timeout_s: float
    ) -> CallOutcome:
        """The answer of another pool; ends there when it is cancelled here. Raises `MaasError` if there is none."""
        ...


class Carried:
    """The context of a call that another pool has passed on.

    Args:
        metadata: of the caller; names this pool.
        timeout_s: what is left of the caller's time.
    """

    def __init__(self, metadata: Mapping[str, str], timeout_s: float) -> None:
        self._metadata = tuple(metadata.items())
        self._until_s = asyncio.get_running_loop().time() + timeout_s
        self._code, self._details = grpc.StatusCode.OK, ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """What the caller sent."""
        return self._metadata

    def time_remaining(self) -> float:
        """Seconds that the caller waits."""
        return self._until_s - asyncio.get_running_loop().time()

    def set_code(self, code: grpc.StatusCode) -> None:
        """Keeps it for the pool that asked."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Keeps it for the pool that asked."""
        self._details = details

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Keeps it for the pool that asked."""
        self._trailing = tuple((key, value) for key, value in metadata)

    def outcome(self, body: bytes) -> CallOutcome:
        """How the call ended."""
        return CallOutcome(bytes(body), int(self._code.value[0]), self._details, self._trailing)


class Unnamed:
    """Finds the pool for calls that name none.

    Args:
        neighbors: the pools of the cluster.
        here: name of this one.
    """

    def __init__(self, neighbors: Neighbors, here: str) -> None:
        self._neighbors = neighbors
        self._here = here

    async def pass_on(self, method: str, body: bytes, context: Any, request_id: bytes) -> CallOutcome | None:
        """The answer of the only pool that serves the model; None if that is this pool.

        Args:
            method: one of `entry.UNARY`.
            body: the serialized request.
            context: of the call.
            request_id: what the answer will carry.

        Raises:
            BadRequest: several pools serve the model, or none is named where the answer depends on the pool.
            NotFound: no pool serves the model.
            MaasError: the other pool gave no answer.
        """
        owner = await self.owner(method, body)
        if owner == self._here:
            return None
        sent = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        sent.pop(UNNAMED_HEADER, None)
        sent |= {APPLICATION: owner, "x-request-id": request_id.decode()}
        remaining = getattr(context, "time_remaining", lambda: None)()
        timeout_s = min(math.inf if remaining is None else remaining, MAX_WAIT_S)
        return await self._neighbors.call(owner, method, body, sent, timeout_s)

    async def owner(self, method: str, body: bytes) -> str:
        """The pool that answers a call; raises as `pass_on`."""
        if method not in ROUTED:
            return self._here
        pools = await self._neighbors.pools()
        if len(pools) < 2:
            return self._here
        name = model_of(method, body)
        if not name and method in _OF_A_POOL:
            raise BadRequest(f"there are several pools, each with an answer of its own; {_WAY_OUT}")
        serving = [pool for pool, served in pools.items() if name in served.names]
        is_open = [pool for pool, served in pools.items() if served.is_open]
        if method == _LOAD:
            found = [pool for pool in serving if pool in is_open] or is_open or serving
        else:
            found = serving or is_open  # where somebody may have loaded it a moment ago
        if len(found) > 1:
            raise BadRequest(f"model {name[:100]!r} may be in more than one pool; {_WAY_OUT}")
        if found:
            return found[0]
        if method == "ModelReady":  # whose answer is "no"
            return self._here
        # As Triton begins this error: its clients look for the words.
        raise NotFound(
            f"Request for unknown model: {name[:100]!r} is not found in any pool; {_WAY_OUT} if it is in one"
        )


def model_of(method: str, body: bytes) -> str:
    """Name of the model that a request is about; empty if it names none. Raises `BadRequest`."""
    if method == "ModelInfer":
        return _first_field(body)
    if len(body) > MAX_CONTROL_BYTES:
        raise too_large(len(body), MAX_CONTROL_BYTES)
    request = parse(QUESTIONS[method].request, body)
    return str(getattr(request, "name", "") or getattr(request, "model_name", ""))


def _first_field(body: bytes) -> str:
    """Field 1 of a message, which writers put first (protobuf.dev/programming-guides/encoding); the rest is not looked at."""
    position = 0
    for _ in range(_MAX_FIELDS):
        if position >= len(body):
            return ""
        tag, position = _varint(body, position)
        kind, length = tag & 7, 0
        if kind == _VARINT:
            _, position = _varint(body, position)
        elif kind == _BYTES:
            length, position = _varint(body, position)
        elif kind in (_FIXED32, _FIXED64):
            length = 4 if kind == _FIXED32 else 8
        else:
            break
        if tag >> 3 == 1 and kind == _BYTES:
            if length > MAX_NAME_BYTES or position + length > len(body):
                break
            return body[position : position + length].decode("utf-8", "replace")
        position += length
    raise BadRequest(f"the name of the model is not at the beginning of the message; put it there, or {_WAY_OUT}")


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(body[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise BadRequest(f"the {len(body)} bytes received are not a ModelInferRequest")
