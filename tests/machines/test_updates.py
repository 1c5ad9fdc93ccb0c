"""On machines that hold a pool once, it is updated one replica at a time, or rolled back with the reason."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from maas_ray.registry.models import Registry
from maas_ray.store.objects import open_store
from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.asking import Asking
from tests.support.hosts.ray_cluster import on_head
from tests.support.hosts.served import publish, serve, statuses, store_uri, write_spec
from tests.support.onnx_models import commit_bundle, linear

LARGE = {"replicas": 2, "resources": {"cpus": 1.5}}
"""Two of them fill two machines of two CPUs so that no third one fits."""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(3) as found:
        publish(found)
        ray_cluster.start(found, num_cpus=2)
        yield found


def test_what_does_not_fit_twice_is_replaced_one_at_a_time(network: Network):
    serve(network, write_spec(network, LARGE))
    with Asking(network.hosts) as asking:
        document = serve(network, write_spec(network, {**LARGE, "server_name": "new"}))
    assert asking.failures == []
    assert any("one at a time: 1 of 2 replicas is unavailable at a time" in line for line in document["done"]), document


def test_an_update_that_fails_is_rolled_back_and_reports_why(network: Network):
    store = open_store(store_uri(network))
    registry = Registry(store)
    bundle = commit_bundle(store, linear(7.0), run="broken")
    registry.promote("broken", registry.publish("broken", bundle).version)
    (graph,) = (network.shared / "store" / "bundles" / bundle).glob("parts-*/model.onnx")
    graph.write_bytes(graph.read_bytes()[:-1])
    serve(network, write_spec(network, LARGE))
    with Asking(network.hosts) as asking:
        spec = write_spec(network, {**LARGE, "models": [{"name": "broken"}]})
        said = on_head(network, f"maas-ray serve {spec} 2>&1", check=False, timeout_s=400)
    assert "model.onnx has" in said
    assert "it was rolled back to the previous version" in " ".join(said.split())
    assert asking.failures == []
    assert statuses(network.hosts) == [200] * 3


def test_two_pools_that_need_the_same_resources_do_not_deadlock(network: Network):
    pools = [
        {"name": name, "route_prefix": f"/{name}", "replicas": 1, "resources": {"cpus": 1.5}} for name in ("one", "two")
    ]
    on_head(network, "maas-ray unserve")
    serve(network, write_spec(network, *pools))
    specs = [
        write_spec(
            network, {**pool, "server_name": "new", "rollout": {"allow_downtime": True}}, name=f"{pool['name']}.yaml"
        )
        for pool in pools
    ]
    both = " & ".join(f"(maas-ray serve --json {spec} > {spec}.out; echo $? > {spec}.code)" for spec in specs)
    on_head(network, f"{{ {both} & wait; }}", timeout_s=600)
    for spec in specs:
        assert Path(f"{spec}.code").read_text().strip() == "0", Path(f"{spec}.out").read_text()
        assert json.loads(Path(f"{spec}.out").read_text().strip().splitlines()[-1])["pools"][0]["status"] == "RUNNING"
