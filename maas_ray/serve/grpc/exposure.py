"""What Serve's own gRPC servers have no option for: where they listen, and how large a message they take in.

Serve opens a gRPC port on every address of a machine, without TLS or a key, in each replica and each Python proxy. The
front alone is for callers; everything behind it is for the cluster, so those ports listen on the node's own address.
"""

from typing import Any

import ray

from maas_ray.ray_internals.serve_servers import replace_grpc_address, replace_internal_port, set_grpc_option

ENVELOPE_BYTES = 64 << 10
"""What a message may have beside the tensors that the pool's limit is meant for."""


def open_no_internal_port() -> None:
    """Keeps Serve from opening a port for calls between deployments; called in a replica before it would.

    That port is on every address, asks for no key and unpickles what it gets: whoever reaches it runs code. Handles
    reach replicas through Ray's own calls, which need the cluster's token (`RAY_SERVE_USE_GRPC_BY_DEFAULT=0`).
    """
    replace_internal_port(_open_nothing)


def listen_on_node_only() -> None:
    """Binds the gRPC port of this process to the node's address; called before Serve opens it."""
    replace_grpc_address(_add_on_node)


def limit_messages(max_body_bytes: int) -> None:
    """Refuses larger messages while they are received or decompressed; called before Serve makes its server.

    gRPC itself answers those RESOURCE_EXHAUSTED. Without this, a few compressed kilobytes could become 256 MiB of zeros
    before anything of ours is asked.
    """
    set_grpc_option("grpc.max_receive_message_length", max_body_bytes + ENVELOPE_BYTES)


def _add_on_node(server: Any, address: str) -> None:
    port = address.rsplit(":", 1)[1]
    host = ray.util.get_node_ip_address()
    # Serve's HAProxy reaches the servers of its own node at loopback.
    for one in dict.fromkeys((host, "127.0.0.1")):
        server.add_insecure_port(f"[{one}]:{port}" if ":" in one else f"{one}:{port}")


def _open_nothing(server: Any, address: str) -> None:
    """Serve takes None for a port that is not there."""
