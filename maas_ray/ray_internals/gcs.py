"""A cluster's head, asked at its address by a process that need not be connected to it. Imports Ray when asked.

Ray's public way, `ray.init`, waits for a head without a deadline, and a process can be connected to one cluster only.
Read in Ray 2.60.0: `ray._raylet.GcsClient`, which passes on to `InnerGcsClient`. The errors are `ray.exceptions`' ones.
"""

from collections.abc import Mapping
from typing import Any

_ALIVE = 0
"""Ray's `GcsNodeInfo.ALIVE`."""


def get(address: str, key: bytes, namespace: bytes, timeout_s: float) -> bytes | None:
    """A value of the head's key-value store, asked with this process's token; None if there is none."""
    found: bytes | None = _client(address).internal_kv_get(key, namespace=namespace, timeout=timeout_s)
    return found


def put(address: str, key: bytes, value: bytes, namespace: bytes, timeout_s: float) -> None:
    """Writes a value of the head's key-value store, over one that is there."""
    _client(address).internal_kv_put(key, value, overwrite=True, namespace=namespace, timeout=timeout_s)


def drain(address: str, node_id: str, why: str, until_ms: int, timeout_s: float) -> None:
    """Tells the head that a node goes, for a reason which cannot be refused.

    Args:
        address: of the head.
        node_id: of the node.
        why: shown by Ray.
        until_ms: when it goes at the latest, in milliseconds since 1970.
        timeout_s: longest wait for the head.
    """
    from ray.core.generated import autoscaler_pb2

    reason = autoscaler_pb2.DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION  # which cannot be refused
    _client(address).drain_node(node_id, reason, why, until_ms, timeout=timeout_s)


def alive_nodes(address: str, host: str | None = None) -> list[str]:
    """Ids of living nodes, all or those of one address, asked with this process's token."""
    found: Mapping[Any, Any] = _client(address).get_all_node_info(timeout=10)
    return [
        node_id.hex()
        for node_id, info in found.items()
        if info.state == _ALIVE and host in (None, info.node_manager_address)
    ]


def _client(address: str) -> Any:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return GcsClient(address=address)
