"""A cluster on this machine whose autoscaler adds nodes and takes them away: Ray's own, with its provider of fake nodes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ray

from maas_ray.cluster.members import head as local
from maas_ray.cluster.node.environment import FRONT_LABEL, NO_FRONT
from maas_ray.cluster.node.state import ClusterState
from tests.conftest import RayCluster
from tests.support.own_cluster import own_cluster

GROUP = "cpu_worker"
IDLE_S = 12.0
VARIABLES = {
    # Ray's own, for its provider of fake nodes and for a quick autoscaler.
    "RAY_FAKE_CLUSTER": "1",
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}
_HEAD = "ray.head.default"  # the name that the provider gives the head


@contextmanager
def worker_group(head_cpus: int, max_workers: int) -> Iterator[RayCluster]:
    """A cluster with a group of nodes of one CPU each, which begins with none. `VARIABLES` must be in the environment.

    Args:
        head_cpus: CPUs of the head.
        max_workers: nodes that the group may have.
    """
    start = local.start_node

    def with_autoscaler(state: ClusterState, arguments: list[str], *more: Any) -> None:
        file = Path(state.temp_dir) / "autoscaler.json"
        file.write_text(json.dumps(_config(state.address, head_cpus, max_workers)))
        start(state, [*arguments, f"--autoscaling-config={file}"], *more)

    with patch.object(local, "start_node", with_autoscaler), own_cluster(head_cpus) as started:
        yield started


def head() -> str:
    """The node to which this process is connected."""
    return str(ray.get_runtime_context().get_node_id())


def num_workers() -> int:
    """Nodes that live beside the head."""
    return sum(node["Alive"] and node["NodeID"] != head() for node in ray.nodes())


def _config(address: str, head_cpus: int, max_workers: int) -> dict[str, Any]:
    return {
        "cluster_name": "group",
        "max_workers": max_workers,
        "upscaling_speed": 10.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": {
            "type": "fake_multinode",
            "gcs_address": address,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "head_node_type": _HEAD,
        "available_node_types": {
            _HEAD: {"resources": {"CPU": head_cpus}, "node_config": {}, "max_workers": 0},
            GROUP: {
                "resources": {"CPU": 1, "object_store_memory": 100 << 20},
                "labels": {FRONT_LABEL: NO_FRONT},  # all nodes share this machine's ports
                "node_config": {},
                "min_workers": 0,
                "max_workers": max_workers,
            },
        },
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        "setup_commands": [],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [],
        "worker_start_ray_commands": [],
    }
