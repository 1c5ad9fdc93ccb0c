"""Joins this machine to the cluster of another machine, as a worker node."""

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path

from maas_ray.addresses import is_loopback
from maas_ray.cluster.connection import check_head, use_environment
from maas_ray.cluster.members.local_node import (
    TOKEN_FILE,
    NodeOptions,
    RecordedNode,
    check_own_address,
    ended_on_failure,
    forget_dead,
    record_node,
)
from maas_ray.cluster.members.terms import read_terms
from maas_ray.cluster.node.environment import Profile, choose_ports, default_profile
from maas_ray.cluster.node.ray_start import start_node
from maas_ray.cluster.node.state import ClusterState, locked, save_state
from maas_ray.errors import ClusterError
from maas_ray.process.home import state_directory
from maas_ray.process.open_files import raise_limit
from maas_ray.process.private_files import write_private
from maas_ray.ray_internals.gcs import alive_nodes

POLL_S = 0.2


def join(
    address: str,
    token: str,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    profile: Profile | None = None,
    labels: Mapping[str, str] | None = None,
    host: str | None = None,
    state_dir: str | Path | None = None,
    temp_dir: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 120.0,
) -> ClusterState:
    """Makes this machine a node of a cluster and records it. On a signal it first ends the processes it started.

    Args:
        address: `host:port` of the head node.
        token: token of the cluster.
        num_cpus: logical CPUs to offer; None: the machine's.
        num_gpus: logical GPUs to offer; None: those that Ray detects.
        profile: profile of the cluster; None: that of the head node.
        labels: labels of the node, for the placement of pools and training.
        host: address of this machine in the cluster; None: its address on the route to the head node.
        state_dir: directory of the record and the token; see `state_directory`.
        temp_dir: directory of Ray's sockets and logs until `down`; None creates one with a short name.
        env: further variables for all processes of the node; they override the profile's.
        timeout_s: timeout until the node is alive.

    Raises:
        ClusterError: a cluster of this directory is already running; the head node does not answer, rejects the token
            or runs another version; a port of the front is in use; this machine does not meet Ray's requirements (see
            `requirements`); Ray did not start.
        SpecError: `host` is not an address of this machine.
    """
    options = NodeOptions(num_cpus, num_gpus, temp_dir, env)
    options.check()
    host = host or own_address(address)
    check_own_address(host)
    if is_loopback(host):
        raise ClusterError(f"{address} is only reachable over loopback ({host}); give the head's network address")
    deadline = time.monotonic() + timeout_s
    directory = state_directory(state_dir)
    raise_limit()  # Ray's processes inherit it
    with locked(directory, timeout_s):
        forget_dead(directory)
        token_path = directory / TOKEN_FILE
        write_private(token_path, token)
        use_environment({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_path)})
        os.environ.pop("RAY_AUTH_TOKEN", None)
        try:
            check_head(address, timeout_s=min(30.0, timeout_s))
            terms = read_terms(address, min(30.0, timeout_s))
            ports = choose_ports(http=terms.http_port if terms is not None else None, dashboard=0)
        except BaseException:
            token_path.unlink(missing_ok=True)
            raise
        node = record_node(
            directory,
            token=token,
            role="worker",
            profile=profile or (terms.profile if terms is not None else default_profile()),
            address=address,
            dashboard_url="",
            host=host,
            ports=ports,
            options=options,
        )
        with ended_on_failure(directory, node.state):
            node_id = _start_worker(node, host, labels or {}, timeout_s, deadline)
        state = ClusterState(**{**vars(node.state), "node_id": node_id})
        save_state(directory, state)
        return state


def _start_worker(node: RecordedNode, host: str, labels: Mapping[str, str], timeout_s: float, deadline: float) -> str:
    """Starts the node and returns its id once the head node lists it."""
    address = node.state.address
    known = set(alive_nodes(address, host))
    arguments = [f"--address={address}", f"--node-ip-address={host}"]
    if labels:
        arguments.append("--labels=" + ",".join(f"{name}={value}" for name, value in labels.items()))
    start_node(node.state, arguments, node.amounts, max(5.0, deadline - time.monotonic()))
    while not (new := set(alive_nodes(address, host)) - known):
        if time.monotonic() > deadline:
            raise ClusterError(f"Ray started, but the head node {address} does not list {host} after {timeout_s:g} s")
        time.sleep(POLL_S)
    return new.pop()


def own_address(head: str) -> str:
    """The local address of this machine on the route to `head`. Sends nothing."""
    host, _, port = head.rpartition(":")
    host = host.strip("[]")
    try:
        number = int(port)
        family = socket.getaddrinfo(host, number, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.connect((host, number))
            return str(sock.getsockname()[0])
    except (OSError, ValueError, OverflowError) as error:
        raise ClusterError(f"cannot reach {head!r}: {error}; give the head node's address as HOST:PORT") from error
