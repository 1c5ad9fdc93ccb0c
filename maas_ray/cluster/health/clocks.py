"""Compares the clocks of a cluster's nodes.

Serve aggregates the measurements of replicas on several nodes by their timestamps, S3 rejects requests with a wrong
time in their signature, and readers compare the timestamps of logs of several nodes. Leases do not depend on clocks
(store/lease.py).
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from maas_ray.cluster.asking import ask_nodes
from maas_ray.cluster.check import Check
from maas_ray.errors import ClusterError

MAX_SKEW_S = 5.0
"""Clocks synchronized by NTP differ by milliseconds; Serve scales by the measurements of the last 30 s or less."""
_LOOKS = 3
"""Measurements of each node; the fastest one counts: the first one waits for a process to start."""
_FIX = "synchronize the clocks of all nodes by NTP (chronyd, systemd-timesyncd)"


class Clock(NamedTuple):
    """A node's clock, compared with that of this process."""

    node: str
    offset_s: float
    """Lead of the node's clock."""
    rtt_s: float
    """Round-trip time of the measurement; the offset is exact to half of it."""
    is_head: bool = False


def measure_clocks(timeout_s: float = 60.0, read: Callable[[], float] = time.time) -> list[Clock]:
    """Measures the clock of each live node. Needs a connected Ray.

    Args:
        timeout_s: timeout for all nodes together.
        read: function that each node runs.

    Raises:
        ray.exceptions.RayError: a node did not answer.
    """
    best: dict[str, Clock] = {}
    deadline = time.monotonic() + timeout_s
    for _ in range(_LOOKS):
        sent = time.time()
        answers = ask_nodes(read, max(1.0, deadline - time.monotonic()))
        rtt = time.time() - sent
        for said in answers:
            found = Clock(said.address, said.value - sent - rtt / 2, rtt, said.is_head)
            if said.node_id not in best or rtt < best[said.node_id].rtt_s:
                best[said.node_id] = found
    return list(best.values())


def check_clocks(clocks: Sequence[Clock], bound_s: float = MAX_SKEW_S) -> Check:
    """Whether every node's clock agrees with that of the head node, within the accuracy of the measurement.

    Args:
        clocks: clocks of all nodes.
        bound_s: largest allowed difference.
    """
    reference = next((clock for clock in clocks if clock.is_head), clocks[0] if clocks else None)
    if reference is None or len(clocks) == 1:
        return Check("clocks", True, "one node")
    ahead = {clock: clock.offset_s - reference.offset_s for clock in clocks if clock is not reference}
    wrong = [
        f"the clock of node {clock.node} is {abs(by):.1f} s {'ahead of' if by > 0 else 'behind'} node {reference.node}"
        for clock, by in ahead.items()
        if abs(by) - (clock.rtt_s + reference.rtt_s) / 2 > bound_s
    ]
    if wrong:
        return Check("clocks", False, f"{'; '.join(wrong)} (limit: {bound_s:g} s)", _FIX)
    largest = max(abs(by) for by in ahead.values())
    return Check("clocks", True, f"{len(clocks)} nodes, at most {largest:.2f} s apart")


def refuse_skew(timeout_s: float = 30.0) -> None:
    """Raises an error if the clocks of a cluster of several nodes disagree. Needs a connected Ray.

    Raises:
        ClusterError: the clocks disagree. A node that does not answer is left to other checks.
    """
    import ray

    if sum(node["Alive"] for node in ray.nodes()) < 2:
        return
    try:
        found = check_clocks(measure_clocks(timeout_s))
    except ray.exceptions.RayError:
        return
    if not found.ok:
        raise ClusterError(f"{found.detail}; {found.fix}")
