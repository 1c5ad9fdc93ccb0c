"""The process that owns a deployment: it finishes it, or takes it back, whatever becomes of the command that asked for it.

One actor of the cluster has this name, so one deployment is in progress at a time: two commands whose pools need the same
room come one after the other, and neither waits for what the other one holds.
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
from maas_ray.serve.spec.pools import PoolSpec, ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store

NAME, NAMESPACE = "maas-ray-rollout", "maas-ray"
POLL_S = 0.25
KEEP_S = 60.0
"""How long the outcome is kept for the command that asked."""
COLLECT_S = 10.0
"""After which it has not, and the next one may begin."""
BEGIN_S = 600.0
"""After which an owner whose command has not told it to begin is removed: the command is gone."""
LOST_S = 120.0
"""Longest time without an answer of the owner: it is started again when its process or node was lost."""
_KEY = b"maas-ray:rollout:"
_HEAD = {"node:__internal_head__": 0.001}

log = get_logger(__name__)


@dataclass(frozen=True)
class DeploymentProgress:
    """What an owner says of itself."""

    ticket: str
    """Of the command that asked."""
    pools: tuple[str, ...]
    lines: tuple[str, ...]
    """What was done so far, for people."""
    outcomes: tuple[PoolOutcome, ...] | None
    """One for each pool; None: not yet."""
    error: str = ""
    """Why there is no outcome, if there never will be."""
    ended_for_s: float = 0.0
    """How long it has been over."""
    waits_for_s: float = 0.0
    """How long it has been waiting to begin."""


class DeploymentOwner:
    """The actor. Its arguments are all that it needs, so that it continues after its process was lost.

    It waits for `begin`: its process starts, and imports what it needs, while the command starts Serve.

    Args:
        ticket: of the command that asks.
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
        if _standings_of(ticket) is not None:  # by a process of this actor that was lost
            self.begin()

    def begin(self) -> None:
        """Starts the deployment, once."""
        with self._lock:
            if self._has_begun:
                return
            self._has_begun = True
        threading.Thread(target=self._run, name="rollout", daemon=True).start()

    def progress(self) -> DeploymentProgress:
        """What is done so far."""
        names = tuple(pool.name for pool in self._spec.pools)
        now_s = time.monotonic()
        over_s = 0.0 if self._ended_s is None else now_s - self._ended_s
        waits_s = 0.0 if self._has_begun else now_s - self._started_s
        return DeploymentProgress(self._ticket, names, tuple(self._lines), self._outcomes, self._error, over_s, waits_s)

    def _run(self) -> None:
        try:
            for pool in self._spec.pools:
                if said := noted(pool.name):
                    self._say(f"pool {pool.name!r}, the deployment before this one: {said}")
            rollout = Rollout(self._spec, self._previous(), self._timeout_s, self._say, self._claim)
            outcomes = rollout.run()
            self._record([outcome.pool for outcome in outcomes if not outcome.reason])
            for outcome in outcomes:
                note(outcome.pool, f"{outcome.reason}; {outcome.what}" if outcome.reason else "")
            self._outcomes = tuple(outcomes)
        except MaasError as error:
            self._error = str(error)
        except Exception as error:  # the command must hear of whatever it is
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
        """What the pools were before this deployment began; also if this process is not its first."""
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
            self._say(f"the store has no record of it, so --restore would bring back what was served before: {error}")


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
    """What a deployment that has begun wrote down of the pools before it; None: it has not begun, or it is over."""
    return kv.get(_KEY + ticket.encode())


def _forget(ticket: str) -> None:
    kv.delete(_KEY + ticket.encode())


@contextmanager
def owner_of(
    ticket: str, spec: ServeSpec, timeout_s: float | None, wait_s: float, say: Callable[[str], None]
) -> Iterator[Any]:
    """An owner that has not begun; it is removed if the block fails before it has.

    Args:
        ticket: a random name of this deployment.
        spec: the pools, with an absolute store.
        timeout_s: overrides `rollout.timeout_s` of each pool.
        wait_s: longest wait for a deployment of somebody else.
        say: called with what is being done.

    Raises:
        ClusterError: another one did not end in time.
    """
    actor = _start(ticket, spec, timeout_s, time.monotonic() + wait_s, wait_s, say)
    try:
        yield actor
    except BaseException:
        if _standings_of(ticket) is None:
            ray.kill(actor, no_restart=True)
        raise


def follow(actor: Any, say: Callable[[str], None]) -> tuple[PoolOutcome, ...]:
    """Has an owner begin, and follows it to its end.

    Args:
        actor: from `owner_of`.
        say: called with what is being done.

    Raises:
        ClusterError: the owner was lost or failed.
    """
    seen, heard = 0, time.monotonic()
    while True:
        try:
            progress: DeploymentProgress = ray.get(actor.progress.remote(), timeout=LOST_S)
            if progress.waits_for_s:  # also a new process of an owner that was lost at once
                ray.get(actor.begin.remote(), timeout=LOST_S)
            heard = time.monotonic()
        except (ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError) as error:
            if time.monotonic() - heard > LOST_S:
                raise ClusterError(
                    f"the actor {NAME!r} that owns the deployment was lost and has not come back within {LOST_S:g} s: "
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
            say(f"waiting for another deployment, of pool {', '.join(other.pools)}")
            has_said = True
        if time.monotonic() > deadline:
            raise ClusterError(
                f"another deployment did not end within {wait_s:g} s"
                + (f"; it is of pool {', '.join(other.pools)}" if other is not None else "")
                + ": wait for it, and deploy again"
            )
        time.sleep(POLL_S)


def _other() -> DeploymentProgress | None:
    """The deployment that is in progress; one that is over, and whose command is gone, is removed."""
    try:
        actor = ray.get_actor(NAME, namespace=NAMESPACE)
        progress: DeploymentProgress = ray.get(actor.progress.remote(), timeout=LOST_S)
    except (ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        return None
    if progress.ended_for_s > COLLECT_S or progress.waits_for_s > BEGIN_S:
        ray.kill(actor, no_restart=True)
        return None
    return progress
