"""Reports the autoscaler's limits to Ray, which the cluster launcher of Ray 2.60 does not.

cluster.yaml runs it on the head node after `ray start`:
`python -m maas_ray.cluster.capacity.autoscaler_limits ~/ray_bootstrap_config.yaml`.
Preflight, and Ray Train's early check, then count nodes that the autoscaler can add.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maas_ray.cluster.connection import connect, disconnect
from maas_ray.errors import MaasError, SpecError
from maas_ray.ray_internals.nodes import NodeGroup, declare_cluster_config
from maas_ray.spec import read_document


def declare_limits(config: Mapping[str, Any]) -> None:
    """Records the node types of a cluster-launcher config in the connected cluster.

    Args:
        config: has `available_node_types`, `head_node_type` and `max_workers`; each type needs `resources`.

    Raises:
        SpecError: the config has no node types.
    """
    types = config.get("available_node_types")
    if not types:
        raise SpecError("the config has no available_node_types; use the file that Ray's cluster launcher wrote")
    groups = []
    most = int(config.get("max_workers", 0))
    for name, node_type in types.items():
        is_head = name == config.get("head_node_type")
        group = NodeGroup(
            name=name,
            min_count=int(node_type.get("min_workers", 0)) + is_head,
            max_count=min(most, int(node_type.get("max_workers", most))) + is_head,
            resources={resource: int(amount) for resource, amount in node_type.get("resources", {}).items()},
        )
        groups.append(group)
    declare_cluster_config(groups)


def main(path: str) -> int:
    """Declares the limits of the launcher's file in the cluster of this environment; returns the exit code."""
    try:
        config = read_document(Path(path).expanduser())
        connect()
        declare_limits(config)
        disconnect()
    except MaasError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)  # noqa: T201 (output of a program)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
