"""Requests to the head node of a cluster, from a process that need not be connected to it. Imports Ray late.

Ray's public way, `ray.init`, has no timeout, and a process can connect to one cluster only. Read in Ray 2.60.0:
`ray._raylet.GcsClient`, which delegates to `InnerGcsClient`. It raises errors of `ray.exceptions`.
"""

from collections.abc import Mapping
from typing import Any

_ALIVE = 0
"""Ray's `GcsNodeInfo.ALIVE`."""


def get(address: str, key: bytes, namespace: bytes, timeout_s: float) -> bytes | None:
    """Reads a value of the head node's key-value store with this process's token; None if the key does not exist."""
    found: bytes | None = _client(address).internal_kv_get(key, namespace=namespace, timeout=timeout_s)
    return found


def put(address: str, key: bytes, value: bytes, namespace: bytes, timeout_s: float) -> None:
    """Writes a value to the head node's key-value store; replaces an existing one."""
    _client(address).internal_kv_put(key, value, overwrite=True, namespace=namespace, timeout=timeout_s)


def drain(address: str, node_id: str, why: str, until_ms: int, timeout_s: float) -> None:
    """Starts the drain of a node, for a reason that Ray cannot reject.

    Args:
        address: address of the head node.
        node_id: id of the node.
        why: message that Ray shows.
        until_ms: deadline of the drain, in milliseconds since 1970.
        timeout_s: timeout for the head node.
    """
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # cannot be rejected
    _client(address).drain_node(node_id, reason, why, until_ms, timeout=timeout_s)


def alive_nodes(address: str, host: str | None = None) -> list[str]:
    """Ids of all live nodes, or of those with one address, read with this process's token."""
    found: Mapping[Any, Any] = _client(address).get_all_node_info(timeout=10)
    return [
        node_id.hex()
        for node_id, info in found.items()
        if info.state == _ALIVE and host in (None, info.node_manager_address)
    ]


def _client(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=address)
