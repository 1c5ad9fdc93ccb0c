"""Checks open files on each node of the connected cluster: the limit of Ray's processes, the connections of HAProxy."""

import os
from collections.abc import Sequence
from pathlib import Path

from maas_ray.cluster.asking import ask_nodes
from maas_ray.cluster.check import Check
from maas_ray.cluster.node.requirements import check_files
from maas_ray.haproxy.config.capacity import Capacity, read_capacities
from maas_ray.haproxy.names import REFUSED_FILE
from maas_ray.process.open_files import limit

FEW = 1_000
"""Number of connections below which a front cannot serve many clients."""
_CONFIG_VARIABLE = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"
_DEFAULT_CONFIG = "/tmp/haproxy-serve/haproxy.cfg"  # noqa: S108 (Serve's default)
_FIX = (
    "raise the hard limit of open files of `ray start` on it (ulimit -Hn, systemd LimitNOFILE, docker --ulimit nofile)"
)


def check_node_files() -> list[Check]:
    """Whether the processes of each node were started with a sufficient limit of open files."""
    checks = []
    for said in ask_nodes(_files_here):
        found = check_files(*said.value)
        checks.append(Check(f"open files of node {said.address}", found.ok, found.detail, found.fix))
    return checks


def check_fronts() -> list[Check]:
    """Whether the HAProxy of each node could be started, and accepts enough connections."""
    return [
        check_front(said.address, [Capacity(*each) for each in said.value[0]], said.value[1])
        for said in ask_nodes(_fronts_here)
    ]


def check_front(node: str, capacities: Sequence[Capacity], refused: Sequence[str]) -> Check:
    """Whether the front of one node could be started, and accepts enough connections.

    Args:
        node: address of the node, for the name of the check.
        capacities: capacities of its HAProxy processes.
        refused: reasons why one could not be started.
    """
    is_fine = not refused and all(not each.is_reduced or each.max_connections >= FEW for each in capacities)
    said = [*refused, *(str(each) if each.is_reduced else f"up to {each.max_connections}" for each in capacities)]
    detail = "; ".join(said) or "no HAProxy has been started on it"
    return Check(f"connections of node {node}", is_fine, detail, "" if is_fine else _FIX)


def refusals() -> list[str]:
    """The reasons why HAProxy could not be started, one for each affected node."""
    return [f"node {said.address}: {reason}" for said in ask_nodes(_fronts_here) for reason in said.value[1]]


def _files_here() -> tuple[int, int]:
    return limit(), os.cpu_count() or 1


def _fronts_here() -> tuple[list[tuple[int, ...]], list[str]]:
    parent = Path(os.environ.get(_CONFIG_VARIABLE, _DEFAULT_CONFIG)).parent
    reasons = [file.read_text().strip() for file in sorted(parent.glob(f"*/{REFUSED_FILE}"))]
    return [tuple(each) for each in read_capacities(parent)], reasons
