"""Settings of Serve's own gRPC servers that have no option: listening address and maximum message size.

Serve opens a gRPC port on every address of a machine, without TLS or a key, in each replica and each Python proxy. Only
the front is for clients; the ports behind it are internal to the cluster and listen on the node's own address.
"""

from typing import Any

import ray

from maas_ray.ray_internals.serve_servers import replace_grpc_address, replace_internal_port, set_grpc_option

ENVELOPE_BYTES = 64 << 10
"""Bytes of a message in addition to its tensors, to which the pool's limit applies."""


def open_no_internal_port() -> None:
    """Prevents Serve from opening a port for calls between deployments; called in a replica before it would.

    That port is open on every address, needs no key and unpickles its input: anyone with access can run code. Handles
    call replicas through Ray's own calls, which need the cluster's token (`RAY_SERVE_USE_GRPC_BY_DEFAULT=0`).
    """
    replace_internal_port(_open_nothing)


def listen_on_node_only() -> None:
    """Binds the gRPC port of this process to the node's address; called before Serve opens it."""
    replace_grpc_address(_add_on_node)


def limit_messages(max_body_bytes: int) -> None:
    """Refuses larger messages while they are received or decompressed; called before Serve creates its server.

    gRPC itself answers them with RESOURCE_EXHAUSTED. Without this limit, a few compressed kilobytes could become 256
    MiB of zeros before any of our code is called.
    """
    set_grpc_option("grpc.max_receive_message_length", max_body_bytes + ENVELOPE_BYTES)


def _add_on_node(server: Any, address: str) -> None:
    port = address.rsplit(":", 1)[1]
    host = ray.util.get_node_ip_address()
    # Serve's HAProxy connects to the servers of its own node by loopback.
    for one in dict.fromkeys((host, "127.0.0.1")):
        server.add_insecure_port(f"[{one}]:{port}" if ":" in one else f"{one}:{port}")


def _open_nothing(server: Any, address: str) -> None:
    """Does not open a port; Serve accepts None for it."""
