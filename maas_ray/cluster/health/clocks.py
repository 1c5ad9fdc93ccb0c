"""Whether the clocks of a cluster's nodes agree.

Serve adds up what replicas of several nodes measured by the time at which they did, S3 refuses requests that are signed
at another time, and who reads the logs of two nodes side by side takes the later line for the later event. Leases do not
depend on it (store/lease.py).
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from maas_ray.cluster.asking import ask_nodes
from maas_ray.cluster.check import Check
from maas_ray.errors import ClusterError

MAX_SKEW_S = 5.0
"""Clocks that are kept by NTP differ by milliseconds; Serve scales by what it saw in the last 30 s or less."""
_LOOKS = 3
"""Of each node; the quickest one counts: the first one has to wait for a process there."""
_FIX = "keep the clocks of all nodes by NTP (chronyd, systemd-timesyncd)"


class Clock(NamedTuple):
    """A node's clock beside that of this process."""

    node: str
    offset_s: float
    """How far it is ahead."""
    rtt_s: float
    """How long the question took; the offset is known to half of it."""
    is_head: bool = False


def measure_clocks(timeout_s: float = 60.0, read: Callable[[], float] = time.time) -> list[Clock]:
    """Asks each living node for its time. Needs a connected Ray.

    Args:
        timeout_s: longest wait for all of them together.
        read: what runs on each node.

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
    """Whether every node's clock agrees with the head's, as far as it could be measured.

    Args:
        clocks: of all nodes.
        bound_s: largest difference.
    """
    reference = next((clock for clock in clocks if clock.is_head), clocks[0] if clocks else None)
    if reference is None or len(clocks) == 1:
        return Check("clocks", True, "one node")
    ahead = {clock: clock.offset_s - reference.offset_s for clock in clocks if clock is not reference}
    wrong = [
        f"the clock of node {clock.node} is {abs(by):.1f} s {'ahead of' if by > 0 else 'behind'} that of {reference.node}"
        for clock, by in ahead.items()
        if abs(by) - (clock.rtt_s + reference.rtt_s) / 2 > bound_s
    ]
    if wrong:
        return Check("clocks", False, f"{'; '.join(wrong)} (at most {bound_s:g} s)", _FIX)
    largest = max(abs(by) for by in ahead.values())
    return Check("clocks", True, f"{len(clocks)} nodes, at most {largest:.2f} s apart")


def refuse_skew(timeout_s: float = 30.0) -> None:
    """Refuses a cluster whose clocks disagree; a cluster of one node is not asked. Needs a connected Ray.

    Raises:
        ClusterError: they do; a node that does not answer is another check's business.
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
