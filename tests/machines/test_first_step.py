"""How long a run takes from its command to its first step, with its ranks on two hosts and on one."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.trained import Training, newest, ranks_on, store_of, until, write_run

NUM_PAIRS = 3
MOST_TIMES = 1.5
FILL = """
import ray, time
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as On
ray.init(address="auto", logging_level="error")
hold = ray.remote(num_cpus=1)(lambda: time.sleep(3600))
nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
held = [hold.options(scheduling_strategy=On(node, soft=False)).remote() for node in nodes]
while ray.available_resources().get("CPU", 0) > len(nodes):
    time.sleep(0.1)
print("full", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A head without CPUs, and two workers of two."""
    with Network(3) as found:
        ray_cluster.start(found, num_cpus=2, timeout_s=400)
        yield found


@contextmanager
def half_full(network: Network) -> Iterator[None]:
    """One CPU of each worker is taken, so that two ranks are on two hosts."""
    head = network.hosts[0]
    (network.shared / "fill.py").write_text(FILL)
    log = f"fill-{time.monotonic_ns()}.log"
    command = f". ~/maas-ray.env && export RAY_ADDRESS={head.address}:6379 && exec python {network.shared}/fill.py"
    process = head.start(command, log)
    try:
        deadline = time.monotonic() + 240
        while "full" not in (head.home / log).read_text():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        for pid in head.pids("fill.py"):
            head.kill(pid)
        process.wait(30)


def first_step_s(network: Network, run: str) -> tuple[float, list[int]]:
    """Seconds from the command to the commit of the first step, and the ranks of each worker."""
    store = store_of(network)
    write_run(network, run, steps=50, every=1, workers={"count": 2, "placement_timeout_s": 600})
    with Training(network, network.hosts[0], run) as training:
        until(lambda: newest(store, run), "step", training=training)
        took_s = time.monotonic() - training.began_s
        ranks = [len(ranks_on(host)) for host in network.hosts[1:]]
        training.wait()
    return took_s, ranks


def test_two_hosts_take_at_most_half_as_long_again_as_one(network: Network) -> None:
    first_step_s(network, "warm-up")  # each host has then read what it imports
    pairs = []
    for number in range(NUM_PAIRS):
        one, ranks = first_step_s(network, f"one-{number}")
        assert sorted(ranks) == [0, 2]
        with half_full(network):
            two, ranks = first_step_s(network, f"two-{number}")
        assert ranks == [1, 1]
        pairs.append((two / one, two, one))
    print("; ".join(f"{ratio:.2f} = {two:.1f} s / {one:.1f} s" for ratio, two, one in pairs))  # noqa: T201
    assert statistics.median(ratio for ratio, _, _ in pairs) <= MOST_TIMES
