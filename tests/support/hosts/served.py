"""Pools on a network of hosts: a store that all of them see, the model `linear` in it, specs, and questions to its fronts."""

import json
from collections.abc import Sequence
from typing import Any

import requests
import yaml

from maas_ray.registry.models import Registry
from maas_ray.store.objects import open_store
from tests.support.hosts.host import Host
from tests.support.hosts.network import Network
from tests.support.hosts.ray_cluster import on_head
from tests.support.onnx_models import commit_bundle, linear

PORT = 8000
ROW = {"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1.0, 2.0, 3.0]}]}
INFER = "/v2/models/linear/infer"


def store_uri(network: Network) -> str:
    return f"file://{network.shared}/store"


def publish(network: Network, scale: float = 2.0) -> int:
    """Makes y = scale x the version of `linear` that is served; returns its number."""
    store = open_store(store_uri(network))
    registry = Registry(store)
    version = registry.publish("linear", commit_bundle(store, linear(scale=scale))).version
    registry.promote("linear", version)
    return version


def write_spec(network: Network, *pools: dict[str, Any], host: str = "0.0.0.0", name: str = "pools.yaml", **more: Any) -> str:  # fmt: skip
    """Writes a ServeSpec where all hosts see it; returns its path."""
    filled = [{"models": [{"name": "linear"}], "resources": {"cpus": 1}, **pool} for pool in pools or ({},)]
    spec = {"storage": {"uri": store_uri(network)}, "http": {"host": host, "port": PORT}, "pools": filled, **more}
    path = network.shared / name
    path.write_text(yaml.safe_dump(spec))
    return str(path)


def serve(network: Network, spec: str, *options: str, timeout_s: float = 300.0) -> dict[str, Any]:
    """Deploys a spec from the head; returns what the command said. The command must end well."""
    text = on_head(network, f"maas-ray serve --json {spec} {' '.join(options)}", timeout_s=timeout_s)
    document: dict[str, Any] = json.loads(text.strip().splitlines()[-1])
    return document


def ask(host: Host, path: str = INFER, body: Any = ROW, *, port: int = PORT, timeout_s: float = 10.0, headers: dict[str, str] | None = None) -> requests.Response:  # fmt: skip
    """Asks one host from outside."""
    url = f"http://{host.address}:{port}{path}"
    if body is None:
        return requests.get(url, timeout=timeout_s, headers=headers)
    return requests.post(url, json=body, timeout=timeout_s, headers=headers)


def statuses(hosts: Sequence[Host], path: str = INFER) -> list[int | str]:
    """What each host's front says; the name of the error where it does not answer."""
    found: list[int | str] = []
    for host in hosts:
        try:
            found.append(ask(host, path, ROW if path.endswith("/infer") else None).status_code)
        except requests.RequestException as error:
            found.append(type(error).__name__)
    return found
