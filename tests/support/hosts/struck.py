"""What can befall a cluster of hosts while it serves, and when it is as it was before. Judges nothing."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, get_args

from tests.support.balancer import Balancer
from tests.support.hosts import fronts
from tests.support.hosts.host import Host
from tests.support.hosts.network import Network
from tests.support.hosts.ray_cluster import wait_for_nodes

Kind = Literal["replica", "haproxy", "worker", "head", "partition"]
KINDS: tuple[Kind, ...] = get_args(Kind)
AWAY_S = (5.0, 15.0)
"""How long a host is off."""
CUT_S = (5.0, 30.0)
"""How long a host is cut off."""
RECOVERY_S = 300.0
END_S = 20.0
QUIET_S = 5.0
"""How long it must have been whole: a node that is back gets its share of the replicas, an HAProxy a new manager."""


@dataclass
class Event:
    """What was done to one host, and until when the cluster was not as before; times of one monotonic clock, in seconds."""

    kind: Kind
    host: str
    address: str
    how: str
    start_s: float
    back_s: float = 0.0
    """When the test restored the lost part; the start if the system itself has to replace it."""
    whole_s: float = 0.0
    """When the cluster was as before."""
    end_s: float = 0.0
    """When it had been so for `QUIET_S`."""


@dataclass
class Struck:
    """A cluster with one pool, and what has happened to it.

    Args:
        network: its hosts; the first one is the head.
        pool: name of the pool, which has a replica on each host.
        balancer: which knows what fronts answer.
        random: of all choices.
    """

    network: Network
    pool: str
    balancer: Balancer
    random: random.Random
    events: list[Event] = field(default_factory=list)

    def wait_whole(self, after: str) -> float:
        """Until each host answers, has a replica, and sends requests to all of them, for `QUIET_S`; returns when that began.

        Raises:
            AssertionError: it did not in `RECOVERY_S`.
        """
        deadline, since = time.monotonic() + RECOVERY_S, None
        while since is None or time.monotonic() - since < QUIET_S:
            now = time.monotonic()
            missing = self._missing()
            since = None if missing else since or now
            assert now < deadline, f"no recovery within {RECOVERY_S:g} s after {after}: {missing}"
            time.sleep(0.2)
        return since

    def _missing(self) -> str:
        hosts, wrong = self.network.hosts, []
        if len(self.balancer.healthy) < len(hosts):
            wrong.append(f"healthy: {self.balancer.healthy}")
        for host in hosts:
            num_own = len(fronts.replicas(host, self.pool))
            num_up = [server.is_down for server in fronts.servers(host, self.pool)].count(False)
            if (num_own, num_up) != (1, len(hosts)):
                wrong.append(f"{host.name}: {num_own} replicas, its HAProxy knows {num_up}")
        return "; ".join(wrong)

    def strike(self, kind: Kind) -> Event:
        """Does one thing of a kind after a random pause; returns once the cluster is whole again."""
        time.sleep(self.random.uniform(0.0, 2.0))
        number = sum(event.kind == kind for event in self.events)
        event = {
            "replica": self._kill_replica,
            "haproxy": self._kill_haproxy,
            "worker": self._lose_worker,
            "head": self._lose_head,
            "partition": self._cut,
        }[kind](number)
        event.whole_s = self.wait_whole(f"{event.how} of {event.host}")
        if kind in ("worker", "head", "partition"):
            wait_for_nodes(self.network, len(self.network.hosts), RECOVERY_S)
        event.end_s = time.monotonic()
        return event

    def _kill_replica(self, number: int) -> Event:
        host = self.random.choice(self.network.hosts)
        return self._kill("replica", host, fronts.replicas(host, self.pool)[0])

    def _kill_haproxy(self, number: int) -> Event:
        host = self.random.choice(self.network.hosts)
        pid = fronts.haproxy(host)
        assert pid is not None, f"{host.name} has no HAProxy although all was well"
        return self._kill("haproxy", host, pid)

    def _kill(self, kind: Kind, host: Host, pid: int) -> Event:
        event = self._begin(kind, host, "SIGKILL")
        host.kill(pid)
        deadline = time.monotonic() + END_S
        while pid in host.pids():
            assert time.monotonic() < deadline, f"{kind} {pid} did not end"
            time.sleep(0.02)
        return event

    def _lose_worker(self, number: int) -> Event:
        return self._lose("worker", self.random.choice(self.network.hosts[1:]), is_silent=number % 2 == 1)

    def _lose_head(self, number: int) -> Event:
        return self._lose("head", self.network.hosts[0], is_silent=number % 2 == 1)

    def _lose(self, kind: Kind, host: Host, *, is_silent: bool) -> Event:
        """Every second time no kernel is left to close the connections."""
        event = self._begin(kind, host, "power cut" if is_silent else "crash")
        if is_silent:
            host.cut()
        host.lose()
        self._sleep_until(event.start_s + self.random.uniform(*AWAY_S))
        if is_silent:
            host.mend()
        event.back_s = time.monotonic()
        host.boot()
        return event

    def _cut(self, number: int) -> Event:
        """Every third time the head."""
        host = self.network.hosts[0] if number % 3 == 2 else self.random.choice(self.network.hosts[1:])
        lasts_s = self.random.uniform(*CUT_S)
        event = self._begin("partition", host, f"{lasts_s:.0f} s")
        host.cut()
        self._sleep_until(event.start_s + lasts_s)
        event.back_s = time.monotonic()
        host.mend()
        return event

    def _begin(self, kind: Kind, host: Host, how: str) -> Event:
        now = time.monotonic()
        event = Event(kind, host.name, host.address, how, now, now)
        self.events.append(event)
        return event

    @staticmethod
    def _sleep_until(moment_s: float) -> None:
        time.sleep(max(0.0, moment_s - time.monotonic()))


def wait_until(condition: Callable[[], object], what: str, timeout_s: float) -> None:
    """Polls until the condition holds. Raises `AssertionError` if it did not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_s:g} s"
        time.sleep(0.1)
