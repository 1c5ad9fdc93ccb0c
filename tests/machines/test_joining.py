"""`maas-ray up --host` and `up --address`: machines join a cluster without cluster.yaml, and leave it in order."""

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import requests

from maas_ray.registry.models import Registry
from maas_ray.store.objects import open_store
from tests.support.heavy_models import LOOPING, looping
from tests.support.hosts import Host, Network
from tests.support.hosts.asking import Asking
from tests.support.hosts.served import PORT, publish, statuses, store_uri, write_spec
from tests.support.onnx_models import commit_bundle

LONG_RUN = {"inputs": [{"name": "n", "shape": [1], "datatype": "INT64", "data": [2_000_000]}]}
"""About two seconds."""
TOKEN = "shared-token"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A head and a host that has nothing yet."""
    with Network(2) as found:
        publish(found)
        store = open_store(store_uri(found))
        registry = Registry(store)
        registry.promote("slow", registry.publish("slow", commit_bundle(store, looping(), LOOPING)).version)
        head = found.hosts[0]
        cli(head, f"up --host {head.address} --num-cpus 2 --port {PORT}")
        (found.shared / TOKEN).write_text((head.home / ".maas-ray" / "token").read_text())
        yield found
        cli(head, "down --drain-timeout-s 0")


@pytest.fixture
def joined(network: Network) -> Iterator[Network]:
    other = network.hosts[1]
    join(network, other)
    yield network
    cli(other, "down --drain-timeout-s 0")


def cli(host: Host, words: str, *, check: bool = True, timeout_s: float = 240.0) -> dict[str, Any]:
    """What a command says on a host; `{}` where it fails and may."""
    done = host.run(f"~/venv/bin/maas-ray {words} --json", check=check, timeout_s=timeout_s)
    lines = done.stdout.strip().splitlines()
    document: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return document


def join(network: Network, host: Host, token: str = TOKEN, check: bool = True) -> dict[str, Any]:
    head = network.hosts[0]
    state = json.loads((head.home / ".maas-ray" / "cluster.json").read_text())
    words = f"up --address {state['address']} --token-file {network.shared / token} --num-cpus 2 --label zone=b"
    return cli(host, words, check=check)


def test_a_machine_joins_with_the_token_and_serves(joined: Network):
    head, other = joined.hosts
    assert cli(head, "status")["num_nodes"] == 2
    assert cli(other, "status")["num_nodes"] == 2
    pools = write_spec(joined, {"replicas": 2, "placement": "one_per_node"})
    document = cli(head, f"serve {pools}")
    assert document["pools"][0]["num_running"] == 2
    assert [len(host.pids("ray::ServeReplica")) for host in joined.hosts] == [1, 1]
    assert statuses(joined.hosts) == [200, 200]
    assert set(cli(head, "status")["fronts"]) == {f"http://{host.address}:{PORT}" for host in joined.hosts}


def test_a_wrong_token_is_refused_within_seconds_and_nothing_is_left(network: Network):
    (network.shared / "wrong").write_text("f" * 64)
    other = network.hosts[1]
    said = join(network, other, token="wrong", check=False)
    assert "rejected the token" in said["error"]["message"]
    assert other.pids("raylet") == []
    assert not (other.home / ".maas-ray" / "cluster.json").exists()
    assert not (other.home / ".maas-ray" / "token").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("up --address 10.99.0.77:6379", "--address needs --token-file"),
        ("up --token-file /etc/hostname", "needs --address HOST:PORT of the head node"),
        ("up --host 10.1.2.3", "not an address of this machine"),
        ("up --host 0.0.0.0", "stands for every address"),
        ("up --address 127.0.0.1:1 --token-file /etc/hostname", "give the head's network address"),
        ("up --address nowhere --token-file /etc/hostname", "HOST:PORT"),
    ],
)
def test_a_machine_that_cannot_join_gets_the_reason(network: Network, words: str, expected: str):
    assert expected in cli(network.hosts[1], words, check=False)["error"]["message"]


def test_a_leaving_machine_answers_its_requests_and_loses_none(joined: Network):
    head, other = joined.hosts
    spec = write_spec(joined, slow_pool(), {"name": "fast", "route_prefix": "/fast", "replicas": 2})
    cli(head, f"serve {spec}")
    calls = LongCalls(head, 4)
    with Asking([head], path="/fast/v2/models/linear/infer") as asking:
        calls.start()
        cli(other, "down")
        time.sleep(1.0)
    assert asking.failures == []
    assert calls.statuses() == [200] * 4
    assert other.pids("raylet") == []
    assert cli(head, "status")["num_nodes"] == 1


def test_a_drain_that_does_not_wait_is_caught(joined: Network):
    """The planted fault: the same machine leaves without a drain, and what it had is lost."""
    head, other = joined.hosts
    cli(head, f"serve {write_spec(joined, slow_pool())}")
    calls = LongCalls(head, 4)
    calls.start()
    cli(other, "down --drain-timeout-s 0")
    assert calls.statuses() != [200] * 4


def slow_pool() -> dict[str, Any]:
    """A pool whose requests are never repeated, so that each one that is lost is seen."""
    return {
        "models": [{"name": "slow"}],
        "replicas": 2,
        "placement": "spread",
        "idempotent": False,
        "resources": {"cpus": 0.5},
        "limits": {"timeout_s": 60},
    }


class LongCalls:
    """Several long requests at once to one front; by the least number of connections they go to different replicas."""

    def __init__(self, host: Host, number: int) -> None:
        self._url = f"http://{host.address}:{PORT}/v2/models/slow/infer"
        self._found: list[int] = []
        self._threads = [threading.Thread(target=self._call) for _ in range(number)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()
        time.sleep(0.5)  # they have arrived

    def statuses(self) -> list[int]:
        for thread in self._threads:
            thread.join(90)
        return self._found

    def _call(self) -> None:
        try:
            self._found.append(requests.post(self._url, json=LONG_RUN, timeout=80).status_code)
        except requests.RequestException:
            self._found.append(0)
