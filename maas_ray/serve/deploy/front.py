"""Serve's HTTP and gRPC front: starts it at the spec's addresses, and checks that the pools answer through it."""

import os
import time
from pathlib import Path

import ray
from ray import serve

from maas_ray.addresses import is_loopback, reachable_host
from maas_ray.cluster.capacity.preflight import has_autoscaler
from maas_ray.cluster.health.front import ask_fronts, front_urls
from maas_ray.cluster.health.unavailable import unavailable
from maas_ray.cluster.node.environment import LOOPBACK
from maas_ray.errors import ClusterError
from maas_ray.haproxy import HOST_FILE_VARIABLE
from maas_ray.ray_internals.serve import grpc_config, http_config, running_client
from maas_ray.serve.spec.pools import ReplicaRange
from maas_ray.serve.spec.serve import ServeSpec

CONTROLLER_TIMEOUT_S = 30.0
GRPC_METHODS = "maas_ray.serve.grpc.entry:add_to_server"


def _environment(name: str) -> str:
    """Returns an environment variable of the processes on a node; runs there."""
    return os.environ.get(name, "")


def _check_profile(spec: ServeSpec, deadline: float) -> None:
    wants = "1" if spec.profile == "fast" else "0"
    answer = ray.remote(num_cpus=0)(_environment).remote("RAY_SERVE_ENABLE_HA_PROXY")
    try:
        has = ray.get(answer, timeout=max(1.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError("the cluster did not run a small task in time; see `ray status`") from error
    if (has or "0") != wants:
        other = "portable" if spec.profile == "fast" else "fast"
        raise ClusterError(
            f"the spec has profile {spec.profile!r}, the cluster was started with {other!r}: set profile: {other} in "
            f"the spec, or restart the cluster with `maas-ray up --profile {spec.profile}`"
        )


def _start_front(spec: ServeSpec) -> None:
    host = spec.http.host
    check_host(host)
    host_file = os.environ.get(HOST_FILE_VARIABLE) if spec.profile == "fast" else None
    if host_file:
        # A cluster on one machine: only HAProxy listens outside. Serve's own option would expose the replicas too.
        _choose_host(Path(host_file), host)
        host = LOOPBACK
    http: dict[str, object] = {"host": host, "port": spec.http.port}
    if spec.http.tls is not None:
        http |= {"ssl_certfile": spec.http.tls.certificate, "ssl_keyfile": spec.http.tls.key}
    grpc = None
    if spec.grpc is not None:
        # Not Serve's reflection: it would describe the messages by our own names; GRPC_METHODS has its own reflection.
        grpc = {"port": spec.grpc.port, "grpc_servicer_functions": [GRPC_METHODS], "enable_reflection": False}
    serve.start(proxy_location="EveryNode", http_options=http, grpc_options=grpc)
    found = http_config()
    if (found.host, found.port) != (host, spec.http.port):
        raise ClusterError(
            f"Serve already listens on {found.host}:{found.port}, the spec says {host}:{spec.http.port}; "
            "use the same address, or run `serve shutdown` first"
        )
    _check_grpc(spec)


def check_host(host: str) -> None:
    """Raises `ClusterError` if the fronts would not all be reachable at `host`, because there are several nodes."""
    nodes = {node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    several = len(nodes) > 1 or (has_autoscaler() and not any(map(is_loopback, nodes)))
    if several and reachable_host(host) == host:
        reached = "from its own machine only" if is_loopback(host) else "on at most one machine"
        raise ClusterError(
            f"the HTTP fronts of {len(nodes)} nodes are configured to listen on {host}, which is reachable {reached}; "
            "use 0.0.0.0 as the host (http.host of a spec, http_options.host of a Serve config): each front is then "
            "reachable at the address of its node, and replicas only for the fronts"
        )


def check_configured_host() -> None:
    """Calls `check_host` for the host in the running Serve's config; does nothing without a config."""
    client = running_client() if ray.is_initialized() else None
    if client is not None and not os.environ.get(HOST_FILE_VARIABLE):
        check_host(str(client.http_config.host))


def _check_grpc(spec: ServeSpec) -> None:
    if spec.grpc is None:
        return
    found = grpc_config(CONTROLLER_TIMEOUT_S)
    if GRPC_METHODS not in found.grpc_servicer_functions or found.port != spec.grpc.port:
        listens = f"has gRPC on port {found.port}" if found.grpc_servicer_functions else "was started without gRPC"
        raise ClusterError(
            f"Serve already {listens}, the spec says port {spec.grpc.port}; use the same, or run `serve shutdown` first"
        )


def _choose_host(path: Path, host: str) -> None:
    if running_client() is not None and path.exists():
        found = path.read_text().strip()
        if found != host:
            raise ClusterError(
                f"Serve already listens on {found}, the spec says {host}; use that address, or run `serve shutdown` first"
            )
        return
    path.write_text(host + "\n")


def _answers(spec: ServeSpec) -> str:
    """Returns an empty string once every pool is ready through the front of every node; else names the problem."""
    proxies = serve.status().proxies
    waiting = sorted(f"{node}: {state.value}" for node, state in proxies.items() if state.value != "HEALTHY")
    if waiting or not proxies:
        return f"proxies are not healthy: {', '.join(waiting) or 'none has started'}"
    if spec.http.tls is not None:
        return ""
    urls = _front_urls(spec)
    for pool in spec.pools:
        path = f"{pool.route_prefix.rstrip('/')}/v2/health/ready"
        if problems := [front.problem for front in ask_fronts(urls, path) if front.problem]:
            return "; ".join(problems)
    return ""


def _front_urls(spec: ServeSpec) -> dict[str, str]:
    """Returns the URL of the front of each living node, by node address."""
    proxies = serve.status().proxies
    nodes = [node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"] and node["NodeID"] in proxies]
    return front_urls(spec.http.host, spec.http.port, nodes)


def _unserved(spec: ServeSpec) -> dict[str, tuple[str, ...]]:
    """Returns the unavailable models of each pool, from the pool's own index, read through a front."""
    urls = _front_urls(spec) if spec.http.tls is None else {}
    if not urls:
        return {}
    front = min(urls.values())
    found: dict[str, tuple[str, ...]] = {}
    for pool in spec.pools:
        if isinstance(pool.replicas, ReplicaRange) and pool.replicas.min == 0:
            continue  # it may be scaled to zero, and this request must not start it
        found[pool.name] = unavailable(front, pool.route_prefix, 30)
    return found
