"""What Serve's controller does for many replicas: its real scheduler and autoscaling state with ours in them, without Ray.

The nodes' resources and labels, which Serve reads from Ray, are given, and the start of an actor is left out.
"""

import pickle
import time
from typing import Any

from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.common import (
    DeploymentID,
    ReplicaID,
    ReplicaMetricReport,
    RequestProtocol,
    TimeStampedValue,
)
from ray.serve._private.config import DeploymentConfig, ReplicaConfig
from ray.serve._private.deployment_info import DeploymentInfo
from ray.serve._private.deployment_scheduler import ReplicaSchedulingRequest, SpreadDeploymentSchedulingPolicy
from ray.serve.schema import Target, TargetGroup

from benchmarks.scale import cpu
from maas_ray.haproxy.names import REPLAYABLE
from maas_ray.serve.controller.autoscaling import BUSY, METRICS_INTERVAL_S, ONGOING, RATE, AutoscalingSpec
from maas_ray.serve.controller.scheduler import PoolScheduler
from maas_ray.serve.deploy.binding import autoscaling_config
from maas_ray.serve.spec.pools import ReplicaRange

SHAPES = ((1, 10), (1, 50), (5, 50), (10, 100), (50, 50), (50, 100), (50, 500))
"""Nodes, and replicas."""
POOL = DeploymentID(REPLAYABLE, "one")


class Nodes:
    """What the scheduler asks of Serve's cache of nodes."""

    def __init__(self, num_nodes: int, cpus: float) -> None:
        self._resources = {f"{number:056x}": {"CPU": cpus, "memory": 64e9} for number in range(num_nodes)}

    def get_active_node_ids(self) -> set[str]:
        return set(self._resources)

    def get_node_labels(self, node: str) -> dict[str, str]:
        return {"ray.io/node-id": node, "ray.io/market-type": "on-demand", "zone": node[-1]}

    def get_total_resources_per_node(self) -> dict[str, dict[str, float]]:
        return self._resources

    get_available_resources_per_node = get_total_resources_per_node


class _Actor:
    """Stands for the class of an actor that is not started."""

    def options(self, **options: Any) -> "_Actor":
        return self

    remote = options


def replica_id(number: int) -> ReplicaID:
    return ReplicaID(f"{number:08x}", POOL)


def scheduler_of(num_nodes: int, cpus: float) -> PoolScheduler:
    """A scheduler with one spread pool, whose replicas take one CPU each."""
    nodes = Nodes(num_nodes, cpus)
    found = PoolScheduler(nodes, min(nodes.get_active_node_ids()), lambda request: None)
    found.on_deployment_created(POOL, SpreadDeploymentSchedulingPolicy())
    config = ReplicaConfig.create(_Actor, init_args=({"placement": {"strategy": "spread"}},), ray_actor_options={"num_cpus": 1})  # fmt: skip
    found.on_deployment_deployed(POOL, config)
    return found


def place(found: PoolScheduler, first: int, number: int) -> None:
    """Has the scheduler choose nodes for new replicas, in one round of Serve's controller."""
    for index in range(first, first + number):
        request = ReplicaSchedulingRequest(
            replica_id(index), _Actor(), {"CPU": 1}, {"name": "replica"}, (), on_scheduled=lambda *parts, **more: None
        )
        found._pending_replicas[POOL][request.replica_id] = request
    found._schedule_with_spread_strategy()


def scheduling(num_nodes: int, num_replicas: int) -> list[float]:
    """Milliseconds of CPU of the controller.

    Returns:
        To place all replicas in one round; then each a look at the pool at rest; a look at one that is uneven (a
        new node came, others are full); and the choice of half of the replicas, which end.
    """
    cpus = num_replicas / num_nodes + 1
    spent = []
    for _ in range(3):
        found = scheduler_of(num_nodes, cpus)
        spent.append(cpu.of_call(lambda found=found: place(found, 0, num_replicas), 1) * 1e3)  # type: ignore[misc]
    by_node: dict[str, int] = {}
    for replica, info in list(found._launching_replicas[POOL].items()):
        by_node[info.target_node_id] = by_node.get(info.target_node_id, 0) + 1
        found.on_replica_running(replica, info.target_node_id)
    if max(by_node.values()) - min(by_node.values()) > 1 or sum(by_node.values()) != num_replicas:
        raise RuntimeError(f"the replicas are not spread: {by_node}")
    resting = cpu.of_call(lambda: found.moves_of(POOL)) * 1e3
    stopping = cpu.of_call(lambda: found._get_replicas_to_stop(POOL, num_replicas // 2)) * 1e3
    found._cluster_node_info_cache._resources["f" * 56] = {"CPU": cpus, "memory": 64e9}
    return [sorted(spent)[1], resting, cpu.of_call(lambda: found.moves_of(POOL)) * 1e3, stopping]


def autoscaling(num_replicas: int, ticks: int = 50) -> list[float]:
    """Of one pool with autoscaling.

    Returns:
        Milliseconds of CPU of one decision, of which Serve's controller makes ten in a second; microseconds to take in
        one report, of which each replica sends two in a second; bytes of a report.
    """
    state = DeploymentAutoscalingState(POOL)
    resolved = AutoscalingSpec(preset="latency").resolve(64, 576)
    config = DeploymentConfig(autoscaling_config=autoscaling_config(resolved, ReplicaRange(min=1, max=2 * num_replicas)))  # fmt: skip
    replicas = [replica_id(number) for number in range(num_replicas)]
    state.register(DeploymentInfo(config, ReplicaConfig.create(_Actor), 0, ""), num_replicas)
    state.update_running_replica_ids(replicas)
    spent, decisions = 0.0, 0

    def report(replica: ReplicaID) -> ReplicaMetricReport:
        now = time.time()
        samples = [TimeStampedValue(now - age * METRICS_INTERVAL_S, 3.0) for age in (3, 2, 1, 0)]
        return ReplicaMetricReport(replica, dict.fromkeys((ONGOING, BUSY, RATE, "running_requests"), samples), now)

    taking = []
    for _ in range(max(1, ticks // 5)):
        reports = [report(replica) for replica in replicas]
        taking.append(cpu.of_call(lambda reports=reports: [state.record_request_metrics_for_replica(one) for one in reports], 1))  # type: ignore[misc]  # fmt: skip
        for _ in range(5):
            spent += cpu.of_call(lambda: state.get_decision_num_replicas(num_replicas), 1)
            decisions += 1
            time.sleep(0.1)
    return [spent / decisions * 1e3, sorted(taking)[len(taking) // 2] / num_replicas * 1e6, float(len(pickle.dumps(reports[0], 5)))]  # fmt: skip


def broadcast_bytes(num_replicas: int) -> float:
    """What the controller sends to the manager of each node's HAProxy whenever a replica comes or goes."""
    targets = [
        Target(ip="10.0.0.1", port=20000 + number, instance_id=f"i-{number:017x}", name=replica_id(number).to_full_id_str())
        for number in range(num_replicas)
    ]  # fmt: skip
    group = TargetGroup(targets=targets, route_prefix="/one", protocol=RequestProtocol.HTTP, app_name="one")
    return float(len(pickle.dumps([group], 5)))
