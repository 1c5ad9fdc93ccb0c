"""Owner of a deployment: a process that completes it or rolls it back even if the command that started it has ended.

It is one named actor of the cluster, so only one deployment is in progress at a time: two commands whose pools need
the same resources run in sequence, and neither waits for what the other one holds.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import ray

from maas_ray.cluster.capacity.claims import claim, end_claim
from maas_ray.display import get_logger
from maas_ray.errors import ClusterError, MaasError
from maas_ray.ray_internals import kv
from maas_ray.serve.deploy.notes import note, noted
from maas_ray.serve.deploy.patience import line
from maas_ray.serve.deploy.record import record
from maas_ray.serve.deploy.rollout import BACK_S, PoolOutcome, Rollout
from maas_ray.serve.deploy.standing import Standing, read_standings
from maas_ray.serve.spec.pools import PoolSpec
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store

NAME, NAMESPACE = "maas-ray-rollout", "maas-ray"
POLL_S = 0.25
KEEP_S = 60.0
"""Seconds for which the outcome is kept for the command."""
COLLECT_S = 10.0
"""Seconds after which an uncollected outcome no longer blocks the next deployment."""
BEGIN_S = 600.0
"""Seconds after which an owner without `begin` is removed: its command has ended."""
LOST_S = 120.0
"""Maximum seconds without a response of the owner: it is restarted if its process or node was lost."""
_KEY = b"maas-ray:rollout:"
_HEAD = {"node:__internal_head__": 0.001}

log = get_logger(__name__)


@dataclass(frozen=True)
class DeploymentProgress:
    """Progress report of an owner."""

    ticket: str
    """Ticket of the command."""
    pools: tuple[str, ...]
    lines: tuple[str, ...]
    """Progress so far, in lines for people."""
    outcomes: tuple[PoolOutcome, ...] | None
    """One outcome for each pool; None: not finished."""
    error: str = ""
    """Why there is no outcome and will be none."""
    ended_for_s: float = 0.0
    """Seconds since the deployment ended."""
    waits_for_s: float = 0.0
    """Seconds that it has been waiting for `begin`."""


class DeploymentOwner:
    """Actor of a deployment. Its arguments contain everything it needs, so that it continues after a lost process.

    It waits for `begin`: its process starts and imports its modules while the command starts Serve.

    Args:
        ticket: ticket of the command.
        spec: a `ServeSpec` as plain values, with an absolute store.
        timeout_s: overrides `rollout.timeout_s` of each pool.
    """

    def __init__(self, ticket: str, spec: dict[str, Any], timeout_s: float | None) -> None:
        self._ticket = ticket
        self._spec = parse_spec(ServeSpec, spec, source="spec")
        self._timeout_s = timeout_s
        self._lines: list[str] = []
        self._outcomes: tuple[PoolOutcome, ...] | None = None
        self._error = ""
        self._claimed: list[str] = []
        self._ended_s: float | None = None
        self._me = ray.get_runtime_context().current_actor
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._has_begun = False
        if _standings_of(ticket) is not None:  # begun by an earlier process of this actor
            self.begin()

    def begin(self) -> None:
        """Starts the deployment, once."""
        with self._lock:
            if self._has_begun:
                return
            self._has_begun = True
        threading.Thread(target=self._run, name="rollout", daemon=True).start()

    def progress(self) -> DeploymentProgress:
        """Returns the current progress."""
        names = tuple(pool.name for pool in self._spec.pools)
        now_s = time.monotonic()
        over_s = 0.0 if self._ended_s is None else now_s - self._ended_s
        waits_s = 0.0 if self._has_begun else now_s - self._started_s
        return DeploymentProgress(self._ticket, names, tuple(self._lines), self._outcomes, self._error, over_s, waits_s)

    def _run(self) -> None:
        try:
            for pool in self._spec.pools:
                if said := noted(pool.name):
                    self._say(f"pool {pool.name!r}: the previous deployment failed: {said}")
            rollout = Rollout(self._spec, self._previous(), self._timeout_s, self._say, self._claim)
            outcomes = rollout.run()
            self._record([outcome.pool for outcome in outcomes if not outcome.reason])
            for outcome in outcomes:
                note(outcome.pool, f"{outcome.reason}; {outcome.what}" if outcome.reason else "")
            self._outcomes = tuple(outcomes)
        except MaasError as error:
            self._error = str(error)
        except Exception as error:  # every error must be reported to the command
            log.exception("the deployment failed")
            self._error = f"{type(error).__name__}: {line(error)}"
        finally:
            for what in self._claimed:
                end_claim(what)
            _forget(self._ticket)
            self._ended_s = time.monotonic()
        time.sleep(KEEP_S)
        ray.kill(self._me, no_restart=True)

    def _previous(self) -> dict[str, Standing | None]:
        """Returns the state of the pools before this deployment began, also if an earlier process began it."""
        known = _standings_of(self._ticket)
        if known is None:
            standings = read_standings()
            found = {pool.name: standings.get(pool.name) for pool in self._spec.pools}
            written = {name: None if one is None else _to_plain(one) for name, one in found.items()}
            kv.put(_KEY + self._ticket.encode(), json.dumps(written).encode())
            return found
        return {name: None if one is None else _from_plain(one) for name, one in json.loads(known).items()}

    def _say(self, text: str) -> None:
        log.info("%s", text)
        self._lines.append(text)

    def _claim(self, pool: PoolSpec) -> None:
        what = f"pool {pool.name!r}"
        timeout_s = pool.rollout.timeout_s if self._timeout_s is None else self._timeout_s
        self._claimed.append(what)
        claim(what, 2 * timeout_s + BACK_S)

    def _record(self, pools: list[str]) -> None:
        if not pools:
            return
        try:
            record(open_store(self._spec.storage), self._spec, pools)
        except MaasError as error:
            self._say(f"the store could not record it, so --restore would restore the previous pools: {error}")


def _to_plain(standing: Standing) -> dict[str, Any]:
    plain = asdict(standing)
    plain["spec"] = None if standing.spec is None else standing.spec.model_dump(mode="json")
    return plain


def _from_plain(plain: dict[str, Any]) -> Standing:
    from maas_ray.serve.deploy.standing import ReplicaState
    from maas_ray.serve.spec.pools import ApplicationSpec

    spec = None if plain["spec"] is None else parse_spec(ApplicationSpec, plain["spec"], source="previous")
    return Standing(**{**plain, "spec": spec, "replicas": [ReplicaState(**one) for one in plain["replicas"]]})


def _standings_of(ticket: str) -> bytes | None:
    """Returns the recorded state of the pools before a deployment; None: it has not begun, or has ended."""
    return kv.get(_KEY + ticket.encode())


def _forget(ticket: str) -> None:
    kv.delete(_KEY + ticket.encode())


@contextmanager
def owner_of(
    ticket: str, spec: ServeSpec, timeout_s: float | None, wait_s: float, say: Callable[[str], None]
) -> Iterator[Any]:
    """Yields an owner that has not begun; removes it if the block fails before it has.

    Args:
        ticket: a random name of this deployment.
        spec: spec of the pools, with an absolute store.
        timeout_s: overrides `rollout.timeout_s` of each pool.
        wait_s: maximum wait for another deployment.
        say: receives progress lines.

    Raises:
        ClusterError: another deployment did not end in time.
    """
    actor = _start(ticket, spec, timeout_s, time.monotonic() + wait_s, wait_s, say)
    try:
        yield actor
    except BaseException:
        if _standings_of(ticket) is None:
            ray.kill(actor, no_restart=True)
        raise


def follow(actor: Any, say: Callable[[str], None]) -> tuple[PoolOutcome, ...]:
    """Starts the deployment of an owner, and follows it until it ends.

    Args:
        actor: owner from `owner_of`.
        say: receives progress lines.

    Raises:
        ClusterError: the owner was lost or failed.
    """
    seen, heard = 0, time.monotonic()
    while True:
        try:
            progress: DeploymentProgress = ray.get(actor.progress.remote(), timeout=LOST_S)
            if progress.waits_for_s:  # also for a new process after an early loss
                ray.get(actor.begin.remote(), timeout=LOST_S)
            heard = time.monotonic()
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() - heard > LOST_S:
                raise ClusterError(
                    f"the actor {NAME!r} that owns the deployment was lost and did not restart within {LOST_S:g} s: "
                    f"{line(error)}; see `maas-ray status`"
                ) from error
            time.sleep(POLL_S)
            continue
        for text in progress.lines[seen:]:
            say(text)
        seen = max(seen, len(progress.lines))
        if progress.error:
            ray.kill(actor, no_restart=True)
            raise ClusterError(progress.error)
        if progress.outcomes is not None:
            ray.kill(actor, no_restart=True)
            return progress.outcomes
        time.sleep(POLL_S)


def _start(
    ticket: str, spec: ServeSpec, timeout_s: float | None, deadline: float, wait_s: float, say: Callable[[str], None]
) -> Any:
    options = {
        "name": NAME,
        "namespace": NAMESPACE,
        "lifetime": "detached",
        "num_cpus": 0,
        "resources": _HEAD,
        "max_restarts": -1,
        "max_concurrency": 4,
    }
    has_said = False
    while True:
        try:
            return (
                ray.remote(DeploymentOwner).options(**options).remote(ticket, spec.model_dump(mode="json"), timeout_s)
            )
        except ValueError:  # the name is taken
            other = _other()
        if other is not None and not has_said:
            say(f"waiting for another deployment to end; its pools: {', '.join(other.pools)}")
            has_said = True
        if time.monotonic() > deadline:
            raise ClusterError(
                f"another deployment did not end within {wait_s:g} s"
                + (f"; its pools: {', '.join(other.pools)}" if other is not None else "")
                + "; wait until it ends, and deploy again"
            )
        time.sleep(POLL_S)


def _other() -> DeploymentProgress | None:
    """Returns the deployment in progress; removes one that has ended and whose command has gone."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        progress: DeploymentProgress = ray.get(actor.progress.remote(), timeout=LOST_S)
    except (ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None
    if progress.ended_for_s > COLLECT_S or progress.waits_for_s > BEGIN_S:
        ray.kill(actor, no_restart=True)
        return None
    return progress
