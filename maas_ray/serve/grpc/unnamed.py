"""Routing of calls that name no pool if there are several: finds the pool that serves their model. Independent of Ray.

Any pool may receive such a call. It looks up which pool serves the model, and forwards the call, once, to that pool.
Nothing here reveals to a client which pools exist.
"""

import asyncio
import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, Protocol

import grpc

from maas_ray.errors import BadRequest, NotFound
from maas_ray.haproxy.names import UNNAMED_HEADER
from maas_ray.serve.grpc.control import CONTROL_METHODS
from maas_ray.serve.grpc.inference.message import parse
from maas_ray.serve.grpc.outcome import CallOutcome
from maas_ray.serve.request.limits import MAX_CONTROL_BYTES, check_size

APPLICATION = "application"
"""Metadata with the name of the pool."""
MAX_WAIT_S = 300.0
"""Maximum wait for another pool if the client has no deadline; a pool scaled to zero needs time to start."""
MAX_NAME_BYTES = 4096
_LOAD = "RepositoryModelLoad"
_OF_A_POOL = frozenset({"RepositoryIndex", "ModelStatistics"})
"""Methods that refer to a whole pool unless they name a model."""
_OF_A_MODEL = frozenset({"ModelInfer", "ModelReady", "ModelMetadata", "ModelConfig", "RepositoryModelUnload", _LOAD})
ROUTED = _OF_A_MODEL | _OF_A_POOL
"""Methods whose response depends on the pool. All others are the same in every pool."""
_WAY_OUT = f"send the name of the pool as the metadata {APPLICATION!r}"
_MAX_FIELDS = 16
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


class Served(NamedTuple):
    """Models served by a pool."""

    names: Collection[str]
    """Models, in memory or not."""
    is_open: bool
    """Whether clients may load any model of the registry."""


class Neighbors(Protocol):
    """Pools of the cluster."""

    async def pools(self) -> Mapping[str, Served]:
        """Returns the models of each pool, including this one. Raises `Overloaded` if they cannot be read now."""
        ...

    async def call(
        self, pool: str, method: str, body: bytes, metadata: Mapping[str, str], timeout_s: float
    ) -> CallOutcome:
        """Returns the response of another pool, or raises `MaasError`; a cancellation is passed on."""
        ...


class Carried:
    """Context of a call that another pool has forwarded.

    Args:
        metadata: metadata of the client; names this pool.
        timeout_s: remaining time of the client.
    """

    def __init__(self, metadata: Mapping[str, str], timeout_s: float) -> None:
        self._metadata = tuple(metadata.items())
        self._until_s = asyncio.get_running_loop().time() + timeout_s
        self._code, self._details = grpc.StatusCode.OK, ""
        self._trailing: tuple[tuple[str, str | bytes], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the client's metadata."""
        return self._metadata

    def time_remaining(self) -> float:
        """Returns the client's remaining time in seconds."""
        return self._until_s - asyncio.get_running_loop().time()

    def set_code(self, code: grpc.StatusCode) -> None:
        """Stores it for the calling pool."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Stores it for the calling pool."""
        self._details = details

    def set_trailing_metadata(self, metadata: Any) -> None:
        """Stores it for the calling pool."""
        self._trailing = tuple((key, value) for key, value in metadata)

    def outcome(self, body: bytes) -> CallOutcome:
        """Returns the outcome of the call."""
        return CallOutcome(bytes(body), int(self._code.value[0]), self._details, self._trailing)


class Unnamed:
    """Finds the pool for calls that name none.

    Args:
        neighbors: pools of the cluster.
        here: name of this pool.
    """

    def __init__(self, neighbors: Neighbors, here: str) -> None:
        self._neighbors = neighbors
        self._here = here

    async def pass_on(self, method: str, body: bytes, context: Any, request_id: bytes) -> CallOutcome | None:
        """Returns the response of the only pool that serves the model; None if that is this pool.

        Args:
            method: one of `entry.UNARY`.
            body: serialized request.
            context: context of the call.
            request_id: request id for the response.

        Raises:
            BadRequest: several pools serve the model, or no model is named and the response depends on the pool.
            NotFound: no pool serves the model.
            MaasError: the other pool did not answer.
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
        """Returns the pool for a call; raises as `pass_on`."""
        if method not in ROUTED:
            return self._here
        pools = await self._neighbors.pools()
        if len(pools) < 2:
            return self._here
        name = model_of(method, body)
        if not name and method in _OF_A_POOL:
            raise BadRequest(f"there are several pools with different responses; {_WAY_OUT}")
        serving = [pool for pool, served in pools.items() if name in served.names]
        is_open = [pool for pool, served in pools.items() if served.is_open]
        if method == _LOAD:
            found = [pool for pool in serving if pool in is_open] or is_open or serving
        else:
            found = serving or is_open  # or pools in which a client may just have loaded it
        if len(found) > 1:
            raise BadRequest(f"model {name[:100]!r} may be in several pools; {_WAY_OUT}")
        if found:
            return found[0]
        if method == "ModelReady":  # which then answers "not ready"
            return self._here
        # The text begins like Triton's: its clients look for the words.
        raise NotFound(
            f"Request for unknown model: {name[:100]!r} is not found in any pool; {_WAY_OUT} if it is in one"
        )


def model_of(method: str, body: bytes) -> str:
    """Returns the name of the model in a request; empty if it has none. Raises `BadRequest`."""
    if method == "ModelInfer":
        return _first_field(body)
    check_size(len(body), MAX_CONTROL_BYTES)
    request = parse(CONTROL_METHODS[method].request, body)
    return str(getattr(request, "name", "") or getattr(request, "model_name", ""))


def _first_field(body: bytes) -> str:
    """Returns field 1 of a message, which is usually first (protobuf.dev/programming-guides/encoding)."""
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
    raise BadRequest(f"the model name is not the first field of the message; put it first, or {_WAY_OUT}")


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = 0
    for index, byte in enumerate(body[position : position + 10]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, position + index + 1
    raise BadRequest(f"the {len(body)} bytes received are not a ModelInferRequest")
