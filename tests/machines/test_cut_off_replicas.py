"""Requests inside a replica whose host was cut off waited until the host was back, 13 s for a cut of 10 s."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
import requests

from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.process import find
from maas_ray.serve.grpc import inference_pb2 as pb
from tests.support.front import REPLICA, Front, backend, until
from tests.support.hosts import Host, Network, ray_cluster
from tests.support.hosts.fronts import servers
from tests.support.hosts.served import ask, publish, serve, write_spec

CUT_S = 10.0
RUN_S = 1.0
BOUND_S = 3.5
"""HAProxy's checks notice within 3 s, and the keeper looks twice a second."""
PORT = 7000
NUM_REQUESTS = 6
GRPC_PORT = 9000
RATE_PER_S = 20.0


@dataclass
class Asked:
    """Requests on their way, and what became of them."""

    url: str
    took_s: list[float] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)

    def send(self, number: int) -> None:
        self.threads = [threading.Thread(target=self._ask) for _ in range(number)]
        for thread in self.threads:
            thread.start()

    def wait(self) -> None:
        for thread in self.threads:
            thread.join(60)

    def _ask(self) -> None:
        began_s = time.monotonic()
        status = requests.post(self.url, data=b"1", timeout=40).status_code
        self.took_s.append(time.monotonic() - began_s)
        self.statuses.append(status)


@pytest.fixture
def network() -> Iterator[Network]:
    """Two hosts with a server that stands in for a replica."""
    with Network(2) as network:
        (network.shared / "replica.py").write_text(REPLICA.replace("127.0.0.1", "0.0.0.0"))
        programs = [host.start(f"{sys.executable} {network.shared}/replica.py {PORT}", "replica.log") for host in network.hosts]  # fmt: skip
        for host in network.hosts:
            until(lambda host=host: requests.get(f"http://{host.address}:{PORT}/-/healthz", timeout=2).ok, "a server", 60)  # fmt: skip
        yield network
        for host, program in zip(network.hosts, programs, strict=True):
            host.lose()
            program.wait(20)


@pytest.fixture
def front(network: Network, tmp_path: Path) -> Iterator[Front]:
    """HAProxy and its keeper on this machine, in front of both."""
    front = Front(tmp_path, num_replicas=0, limits=PoolLimits(timeout_s=20.0, drain_s=6.0, max_body_bytes=1 << 20))
    pool = backend("pool", front.deployment, [PORT] * len(network.hosts))
    for server, host in zip(pool.servers, network.hosts, strict=True):
        server.host = host.address
    front.pools = [pool]
    try:
        front.manager().start()
        until(lambda: front.answers() and front.keeper(), "an answer", 60)
        yield front
    finally:
        front.close()


def cut_with_requests_inside(front: Front, host: Host, *, is_told: bool) -> Asked:
    """Cuts a host off for `CUT_S` while it computes; `is_told`: a router reports it to every sender."""
    asked = Asked(f"{front.url}/pool/x?wait={RUN_S}")
    asked.send(NUM_REQUESTS)
    time.sleep(RUN_S / 3)
    host.cut()
    route(host, "add", is_told)
    time.sleep(CUT_S)
    route(host, "del", is_told)
    host.mend()
    asked.wait()
    return asked


def route(host: Host, verb: str, is_told: bool) -> None:
    if is_told:
        subprocess.run(["ip", "route", verb, "unreachable", host.address], check=True, timeout=20)


@pytest.mark.parametrize("is_told", [False, True], ids=["silence", "no-route-to-host"])
def test_requests_in_a_replica_that_was_cut_off_are_answered_by_another(front: Front, network: Network, is_told: bool) -> None:  # fmt: skip
    asked = cut_with_requests_inside(front, network.hosts[0], is_told=is_told)
    assert asked.statuses == [200] * NUM_REQUESTS
    assert max(asked.took_s) < BOUND_S + 2 * RUN_S
    assert "is silent" in front.log()


def test_without_the_keeper_they_wait_until_the_host_is_back(front: Front, network: Network) -> None:
    """The planted fault, which shows that requests were inside."""
    keepers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit() and is_keeper_of(path, front)]
    assert keepers
    stopped = [find(pid) for pid in keepers]
    for keeper in stopped:
        keeper.send(signal.SIGSTOP)
    try:
        asked = cut_with_requests_inside(front, network.hosts[0], is_told=False)
    finally:
        for keeper in stopped:
            keeper.send(signal.SIGCONT)
    assert max(asked.took_s) > CUT_S - 1


def is_keeper_of(process: Path, front: Front) -> bool:
    try:
        command, directory = (process / "cmdline").read_bytes(), os.readlink(process / "cwd")
    except OSError:
        return False
    return b"maas_ray.haproxy.keeper" in command and directory == str(front.directory)


@pytest.fixture(scope="module")
def served() -> Iterator[Network]:
    """An idempotent pool with a replica on each of three hosts."""
    with Network(3) as network:
        publish(network)
        ray_cluster.start(network, num_cpus=2, head_cpus=2)
        pool = {"name": "any", "replicas": 3, "idempotent": True, "limits": {"timeout_s": 20.0}}
        serve(network, write_spec(network, pool, grpc={"port": GRPC_PORT}))
        until(lambda: all(len(servers(host, "any")) == 3 for host in network.hosts), "all replicas in every front", 120)
        yield network


def http_call(host: Host) -> bool:
    return ask(host, timeout_s=40).status_code == 200


def grpc_call(host: Host) -> bool:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", shape=[1, 3], datatype="FP32")
    tensor.contents.fp32_contents.extend([1.0, 2.0, 3.0])
    with grpc.insecure_channel(f"{host.address}:{GRPC_PORT}") as channel:
        call = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer",
            request_serializer=pb.ModelInferRequest.SerializeToString,
            response_deserializer=pb.ModelInferResponse.FromString,
        )
        return bool(call(pb.ModelInferRequest(model_name="linear", inputs=[tensor]), timeout=40).outputs)


@pytest.mark.parametrize("call", [http_call, grpc_call])
def test_calls_through_the_other_hosts_are_answered_within_the_bound(served: Network, call: Callable[[Host], bool]) -> None:  # fmt: skip
    *others, cut = served.hosts
    took_s = calls_while_cut(call, others, cut)
    assert len(took_s) > RATE_PER_S * CUT_S
    assert max(took_s) < BOUND_S + RUN_S


def calls_while_cut(call: Callable[[Host], bool], asked: list[Host], cut: Host) -> list[float]:
    """How long each call took that was sent from a second before a host was cut off until a second after its return.

    Raises:
        AssertionError: one was not answered, or not well.
    """

    def timed(host: Host) -> float:
        began_s = time.monotonic()
        assert call(host)
        return time.monotonic() - began_s

    sent: list[Future[float]] = []
    with ThreadPoolExecutor(64) as pool:

        def send(duration_s: float) -> None:
            end_s = time.monotonic() + duration_s
            while time.monotonic() < end_s:
                sent.append(pool.submit(timed, asked[len(sent) % len(asked)]))
                time.sleep(1 / RATE_PER_S)

        send(1.0)
        cut.cut()
        try:
            send(CUT_S)
        finally:
            cut.mend()
        send(1.0)
        return [future.result() for future in sent]
