"""Serve's scheduler of replicas, extended to select the node for replicas of our pools.

Serve requests `SPREAD` from Ray, which is best effort: each raylet uses its own round robin, so that two replicas of
one pool can start on one node although another one is empty. And of surplus replicas Serve ends those of the emptiest
node first.
"""

from collections import Counter
from typing import Any

from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.ray_internals.serve_controller import DeploymentScheduler, node_labels_match_selector
from maas_ray.serve.controller.balance import emptiest, fullest, num_moves


class PoolScheduler(DeploymentScheduler):  # type: ignore[misc]
    """Serve's scheduler with the placement of our pools; other applications are placed as Serve does it."""

    def __init__(self, *parts: Any, **options: Any) -> None:
        super().__init__(*parts, **options)
        self._strategies: dict[Any, str] = {}

    def on_deployment_deployed(self, deployment_id: Any, replica_config: Any, *parts: Any, **options: Any) -> None:
        super().on_deployment_deployed(deployment_id, replica_config, *parts, **options)
        self._strategies.pop(deployment_id, None)
        if deployment_id.name in (REPLAYABLE, NOT_REPLAYABLE) and replica_config.init_args:
            self._strategies[deployment_id] = replica_config.init_args[0]["placement"]["strategy"]

    def on_deployment_deleted(self, deployment_id: Any) -> None:
        super().on_deployment_deleted(deployment_id)
        self._strategies.pop(deployment_id, None)

    def moves_of(self, deployment_id: Any) -> int:
        """Returns how many replicas of a pool should move for an even spread; 0 if it is not ours or not spread."""
        if self._strategies.get(deployment_id) != "spread":
            return 0
        held = self._held(deployment_id)
        if not held or max(held.values()) - min(held.values()) <= 1:
            return 0
        needed, available = (
            self._deployments[deployment_id].required_resources,
            self._get_available_resources_per_node(),
        )
        room = {node: self._room(available[node], needed, max(held.values())) for node in held}
        return num_moves(held, room)

    def _schedule_with_spread_strategy(self) -> None:
        # Counts over all replicas and nodes are computed once and then updated: hundreds of replicas may be waiting.
        available, busy = self._get_available_resources_per_node(), self._busy()
        for deployment_id, pending in self._pending_replicas.items():
            held = self._held(deployment_id) if pending and deployment_id in self._strategies else Counter[str]()
            for request in list(pending.values()):
                node = self._choose(deployment_id, request, available, held, busy)
                scheduled = self._schedule_replica(request, default_scheduling_strategy="SPREAD", target_node_id=node)
                if scheduled and node is not None:
                    available[node] = available[node] - request.requested_resources
                    held[node] += 1
                    busy[node] += 1

    def _choose(
        self, deployment_id: Any, request: Any, available: dict[str, Any], held: Counter[str], busy: Counter[str]
    ) -> str | None:
        """Returns the node of a new replica; None leaves the decision to Ray, which waits for free resources."""
        needed = request.requested_resources
        match self._strategies.get(deployment_id):
            case None:
                return None
            case "pack":
                rooms = {node: available[node] for node in held if available[node].can_fit(needed)}
                used = {node: range(number) for node, number in busy.items()}  # Serve checks which are empty
                node: str | None = self._find_best_fit_node_for_pack(needed, rooms, used)
                return node
            case _:
                return emptiest(held, busy, lambda node: bool(available[node].can_fit(needed)))

    def _get_replicas_to_stop(self, deployment_id: Any, max_num_to_stop: int, **gangs: Any) -> set[Any]:
        if self._strategies.get(deployment_id) != "spread":
            stopped: set[Any] = super()._get_replicas_to_stop(deployment_id, max_num_to_stop, **gangs)
            return stopped
        chosen = [
            *self._pending_replicas[deployment_id],
            *self._launching_replicas[deployment_id],
            *self._recovering_replicas[deployment_id],
        ][:max_num_to_stop]
        by_node: dict[str, list[Any]] = {}
        for replica, node in self._running_replicas[deployment_id].items():  # oldest first
            by_node.setdefault(node, []).append(replica)
        held, busy = {node: len(replicas) for node, replicas in by_node.items()}, self._busy()
        while held and len(chosen) < max_num_to_stop:
            node = fullest(held, self._head_node_id, busy)
            chosen.append(by_node[node].pop())
            held[node] -= 1
            if not held[node]:
                del held[node]
        return set(chosen)

    def _held(self, deployment_id: Any) -> Counter[str]:
        """Returns the replicas of a deployment on each eligible node: alive, not draining, with the required labels."""
        selector = self._deployments[deployment_id].label_selector or {}
        nodes = self._cluster_node_info_cache.get_active_node_ids()
        labels = {node: self._cluster_node_info_cache.get_node_labels(node) for node in nodes}
        held = Counter({node: 0 for node in nodes if node_labels_match_selector(labels[node], selector)})
        placed = [*self._running_replicas[deployment_id].values()]
        placed += [info.target_node_id for info in self._launching_replicas[deployment_id].values()]
        held.update(node for node in placed if node in held)
        return held

    def _busy(self) -> Counter[str]:
        placed = [node for replicas in self._running_replicas.values() for node in replicas.values()]
        placed += [info.target_node_id for each in self._launching_replicas.values() for info in each.values()]
        return Counter(node for node in placed if node is not None)

    @staticmethod
    def _room(available: Any, needed: Any, limit: int) -> int:
        """Returns how many replicas fit on a node, up to `limit`."""
        num = 0
        while num < limit and available.can_fit(needed):
            available = available - needed
            num += 1
        return num
