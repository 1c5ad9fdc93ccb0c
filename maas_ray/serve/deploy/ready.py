"""Readiness of a pool through the front of this node. Fronts of other nodes are no reason for a rollback."""

import ray
from ray import serve

from maas_ray.cluster.health.front import ask_fronts, front_urls
from maas_ray.serve.spec.pools import PoolSpec
from maas_ray.serve.spec.serve import ServeSpec


def not_ready(spec: ServeSpec, pool: PoolSpec) -> str:
    """Returns why a pool is not ready for clients on this node; empty if it is, or this node has no front."""
    if spec.http.tls is not None or ray.get_runtime_context().get_node_id() not in serve.status().proxies:
        return ""
    urls = front_urls(spec.http.host, spec.http.port, [ray.util.get_node_ip_address()])
    (front,) = ask_fronts(urls, f"{pool.route_prefix.rstrip('/')}/v2/health/ready")
    return front.problem
