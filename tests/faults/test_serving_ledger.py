"""A pool behind HAProxy suffers kills, scaling, redeployment and swaps under load: no caller may notice any of it."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import ray
import requests
from ray.util.state import list_actors

from maas_ray.cluster.node.processes import MARKER
from maas_ray.cluster.node.state import load_state
from maas_ray.errors import NotFound
from maas_ray.registry.models import Registry
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore, open_store
from tests.conftest import RayCluster, unused_port
from tests.support.callers import Callers, linear_answer
from tests.support.ledger import Record, judge, read_records, save_history
from tests.support.onnx_models import commit_bundle, linear
from tests.support.root import ROOT
from tests.support.victims import servers_up, started, until

if TYPE_CHECKING:
    from maas_ray.serve.deploy.pool import PoolStatus

pytestmark = [
    # Ray's own use of pydantic, at import, and of the sockets of its clients.
    pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

POOL = "ledger"
PATH = f"/{POOL}/v2/models/linear"
HISTORIES = ROOT / "build" / "ledger"
"""Where the history of a run that failed is kept."""


NODE = """
import sys
from ray._private.node import Node
from ray._private.parameter import RayParams
params = RayParams(gcs_address=sys.argv[1], node_ip_address="127.0.0.1", num_cpus=8)
params.update(min_worker_port=0, max_worker_port=0, object_store_memory=100 << 20)
node = Node(params, head=False, shutdown_at_exit=False, spawn_reaper=False)
sys.stdin.read()
node.kill_all_processes(check_alive=False, allow_graceful=True)
"""
"""A node on an address on which one is already: `ray start` refuses that on loopback."""


@dataclass(frozen=True)
class Plan:
    """How often each thing happens; all of it must have happened, or the run is void."""

    kills: int
    scalings: int
    redeployments: int
    swaps: int
    """To a new version, every second one to a bundle that does not load."""
    stopped_nodes: int = 0
    kill_every_s: float = 5.0


SHORT = Plan(kills=1, scalings=2, redeployments=1, swaps=2, kill_every_s=0.0)
LONG = Plan(kills=24, scalings=6, redeployments=3, swaps=20)


class Nemesis:
    """Does things to a pool, and counts what really happened."""

    def __init__(self, cluster: RayCluster, store: ObstoreStore, records: Path, seed: int) -> None:
        self.happened = {"kills": 0, "scalings": 0, "redeployments": 0, "swaps": 0, "stopped_nodes": 0}
        self.kills_s: list[float] = []
        self.good: set[int] = set()
        """Versions that may answer."""
        self._cluster = cluster
        self._store = store
        self._registry = Registry(store)
        self.records = records
        self._random = random.Random(seed)
        self._pool: dict[str, Any] = {"replicas": 2}

    def publish(self, version: int, *, is_broken: bool = False) -> None:
        """Version v computes (1 + v) x; a broken one has lost its last byte."""
        bundle = commit_bundle(self._store, linear(1.0 + version), run=f"run-{version}")
        if is_broken:
            graph = next(Path(self._store.uri.removeprefix("file://")).glob(f"bundles/{bundle}/parts-*/model.onnx"))
            graph.write_bytes(graph.read_bytes()[:-1])
        assert self._registry.publish("linear", bundle).version == version
        if not is_broken:
            self.good.add(version)
        self.promote(version)

    def promote(self, version: int) -> None:
        self._registry.promote("linear", version)

    def deploy(self, **changes: Any) -> "PoolStatus":
        from maas_ray.serve.deploy import pool

        self._pool.update(changes)
        described = {
            "name": POOL,
            "route_prefix": f"/{POOL}",
            "models": [{"name": "linear"}],
            "resources": {"cpus": 0.5},
            "refresh": {"poll_interval_s": 0.2, "max_backoff_s": 1.0},
            "observability": {"access_log": {"enabled": True, "path": str(self.records), "flush_every_s": 0.1}},
            **self._pool,
        }
        spec = {"storage": {"uri": self._store.uri}, "http": {"port": self._cluster.http_port}, "pools": [described]}
        (status,) = pool.deploy(parse_spec(ServeSpec, spec))
        assert status.status == "RUNNING"
        self.wait_whole()
        return status

    def undeploy(self) -> None:
        from maas_ray.serve.deploy import pool

        pool.undeploy([POOL])
        assert POOL not in [status.name for status in pool.status()]
        with pytest.raises(NotFound, match=f"no pool {POOL}; "):
            pool.undeploy([POOL])

    def num_on(self, node: str) -> int:
        """Replicas of the pool on a node."""
        actors = list_actors(
            self._cluster.dashboard_url,
            filters=[("state", "=", "ALIVE"), ("node_id", "=", node)],
            limit=1000,
            timeout=30,
        )
        return sum(actor.class_name.startswith(f"ServeReplica:{POOL}:") for actor in actors)

    def drain(self, node: str) -> None:
        """Tells Ray that a node will go, and waits until the pool has left it."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", f"--address={self._cluster.address}"]
        command += [f"--node-id={node}", "--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=test"]
        command += ["--deadline-remaining-seconds=120"]
        environment = {**os.environ, **self._cluster.env}
        subprocess.run(command, env=environment, check=True, timeout=60, capture_output=True)
        until(lambda: self.num_on(node) == 0, "node without a replica", timeout_s=120)
        self.wait_whole()

    def stop(self, node: str, process: subprocess.Popen[bytes]) -> None:
        """Ends a drained node."""
        process.communicate(timeout=60)  # the end of its input ends it
        until(lambda: node not in _alive(), "end of the node")
        self.happened["stopped_nodes"] += 1

    def replicas(self) -> dict[int, str]:
        """Process ids of the pool's replicas, with their actors."""
        filters = [("state", "=", "ALIVE")]
        actors = list_actors(self._cluster.dashboard_url, filters=filters, limit=1000, timeout=30)
        own = [actor for actor in actors if actor.class_name.startswith(f"ServeReplica:{POOL}:") and actor.pid]
        return {int(actor.pid): str(actor.actor_id) for actor in own}

    def wait_whole(self) -> None:
        """Until Serve and HAProxy have exactly the replicas that there should be: no fault meets another one's mending."""
        from maas_ray.serve.deploy import pool

        wanted = self._pool["replicas"]
        until(
            lambda: pool.status([POOL])[0].num_running == wanted == servers_up(POOL) and len(self.replicas()) == wanted,
            f"pool of {wanted} replicas",
        )

    def kill(self) -> None:
        """kill -9 of a random replica, while another one is known to serve."""
        self.wait_whole()
        pid = self._random.choice(sorted(self.replicas()))
        birth = started(pid)
        os.kill(pid, signal.SIGKILL)
        self.kills_s.append(time.monotonic())
        until(lambda: started(pid) != birth, f"end of {pid}")
        until(lambda: pid not in self.replicas(), f"report of the end of {pid}")
        self.happened["kills"] += 1

    def scale(self, replicas: int) -> None:
        self.deploy(replicas=replicas)
        self.happened["scalings"] += 1

    def redeploy(self, timeout_s: float) -> None:
        before = set(self.replicas())
        self.deploy(limits={"timeout_s": timeout_s})
        assert before.isdisjoint(self.replicas()), "the same replicas continue: nothing was redeployed"
        self.happened["redeployments"] += 1

    def swap(self, version: int, callers: Callers, *, is_broken: bool) -> None:
        self.publish(version, is_broken=is_broken)
        if is_broken:
            url = f"http://127.0.0.1:{self._cluster.http_port}{PATH}/ready"
            told = f"version {version} cannot be loaded"
            until(lambda: told in requests.get(url, timeout=30).text, f"word of broken version {version}")
            callers.wait(100)
        else:
            callers.wait(50, version=version)
        self.happened["swaps"] += 1


def check_surface(url: str) -> None:
    """What callers of a pool behind HAProxy see besides the values."""
    tensor = {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3]}
    answer = requests.post(f"{url}/infer", json={"inputs": [tensor]}, headers={"x-request-id": "mine"}, timeout=30)
    assert answer.json()["outputs"][0]["data"] == [2.0, 4.0, 6.0]
    assert (answer.headers["x-maas-run"], answer.headers["x-maas-version"]) == ("run-1", "1")
    assert answer.headers["x-request-id"] == "mine", "sent once, though Serve has a hand in it"
    assert requests.get(f"{url}/infer", timeout=30).status_code == 405
    assert requests.get(f"{url.removesuffix('linear')}none", timeout=30).status_code == 404


@pytest.fixture
def nothing_left(ray_cluster: RayCluster) -> Iterator[None]:
    from maas_ray.serve.deploy import pool

    yield
    pool.undeploy([status.name for status in pool.status([POOL])])


@pytest.mark.fault
@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(
    "plan",
    [pytest.param(SHORT, id="short"), pytest.param(LONG, id="long", marks=pytest.mark.timeout(1800))],
)
def test_no_caller_notices_what_a_pool_suffers(ray_cluster: RayCluster, tmp_path: Path, plan: Plan) -> None:
    seed = random.randrange(1 << 30)
    nemesis = Nemesis(ray_cluster, open_store(f"file://{tmp_path}/store"), tmp_path / "access.jsonl", seed)
    nemesis.publish(1)
    nemesis.publish(2)
    nemesis.promote(1)
    status = nemesis.deploy()
    assert (status.name, status.route_prefix, status.num_running) == (POOL, f"/{POOL}", 2)
    check_surface(f"http://127.0.0.1:{ray_cluster.http_port}{PATH}")
    with Callers(ray_cluster.http_port, f"{PATH}/infer") as callers:
        callers.wait(100)
        before = nemesis.replicas()
        nemesis.deploy()
        assert nemesis.replicas() == before, "the same spec again starts nothing"
        nemesis.promote(2)
        callers.wait(50, version=2)
        for _ in range(plan.kills):
            nemesis.kill()
            time.sleep(plan.kill_every_s)
        for number in range(plan.scalings):
            nemesis.scale((3, 2)[number % 2])
            callers.wait(50)
        for number in range(plan.redeployments):
            nemesis.redeploy(timeout_s=20.0 + number)
            callers.wait(50)
        for number in range(plan.swaps):
            nemesis.swap(3 + number, callers, is_broken=number % 2 == 1)
    nemesis.undeploy()

    prove(nemesis, callers, plan, seed)


def prove(nemesis: Nemesis, callers: Callers, plan: Plan, seed: int) -> None:
    """Judges a run, and keeps its history if it fails."""

    def right(id: str, version: int) -> str | None:
        return linear_answer(id, version) if version in nemesis.good else None

    records: list[Record] = []
    try:
        # All but the question that `check_surface` asked.
        records = [record for record in read_records(str(nemesis.records)) if record.id != "mine"]
        events = {name: (count, getattr(plan, name)) for name, count in nemesis.happened.items()}
        verdict = judge(callers.calls, records, right, events=events, kills_s=nemesis.kills_s)
        slowest_s = max(call.ended_s - call.sent_s for call in callers.calls)
        print(f"{verdict}; {nemesis.happened}, seed {seed}, slowest answer {slowest_s:.2f} s")  # noqa: T201
        assert verdict.faults == {}, str(verdict)
    except AssertionError:
        kept = HISTORIES / f"{int(time.time())}.jsonl"
        save_history(kept, callers.calls, records, {"seed": seed, "plan": str(plan), "kills_s": nemesis.kills_s})
        print(f"the history is kept in {kept}")  # noqa: T201
        raise


@contextmanager
def second_node(cluster: RayCluster, log: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """A node of its own on this machine, with a front on other ports; gives its id and the process that ends it."""
    state = load_state(cluster.state_dir)
    assert state is not None
    before = {node["NodeID"] for node in ray.nodes()}
    ports = {
        name: str(unused_port())
        for name in (
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT", "RAY_SERVE_WORKER_PROXY_GRPC_PORT",
            "RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_HAPROXY_METRICS_PORT",
        )
    }  # fmt: skip
    # The mark lets the end of the cluster find what a failed test leaves.
    environment = {**os.environ, **cluster.env, **ports, MARKER: state.cluster_id}
    command = [sys.executable, "-c", NODE, cluster.address]
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        until(lambda: len(_alive() - before) == 1 or process.poll() is not None, "second node")
        assert process.poll() is None, log.read_text()[-3000:]
        yield next(iter(_alive() - before)), process
    finally:
        if process.poll() is None:
            process.communicate(timeout=60)


def _alive() -> set[str]:
    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


@pytest.mark.fault
@pytest.mark.usefixtures("nothing_left")
def test_no_caller_notices_a_node_that_is_drained_and_stopped(ray_cluster: RayCluster, tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    nemesis = Nemesis(ray_cluster, open_store(f"file://{tmp_path}/store"), tmp_path / "access.jsonl", seed)
    nemesis.publish(1)
    with second_node(ray_cluster, tmp_path / "node.log") as (node, process):
        nemesis.deploy(replicas=4)
        assert nemesis.num_on(node) > 0, "no replica is on the node that will go"
        with Callers(ray_cluster.http_port, f"{PATH}/infer") as callers:
            callers.wait(200)
            nemesis.drain(node)
            callers.wait(200)
            nemesis.stop(node, process)
            callers.wait(200)
    nemesis.undeploy()
    prove(nemesis, callers, Plan(0, 0, 0, 0, stopped_nodes=1), seed)
