"""Deploys and removes pools. Every wait is bounded."""

import time
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace

import ray

from maas_ray.cluster.health.clocks import refuse_skew
from maas_ray.errors import ClusterError, MaasError, NotFound, ResourcesMissing
from maas_ray.ray_internals.serve import delete_without_waiting
from maas_ray.registry.models import Registry
from maas_ray.serve.deploy.front import _answers, _check_profile, _start_front, _unserved
from maas_ray.serve.deploy.notes import note
from maas_ray.serve.deploy.owner import follow, owner_of
from maas_ray.serve.deploy.patience import STARTING, patiently
from maas_ray.serve.deploy.record import forget
from maas_ray.serve.deploy.refused import refuse_without_front, with_reasons
from maas_ray.serve.deploy.rollout import PoolOutcome
from maas_ray.serve.deploy.standing import read_standings
from maas_ray.serve.deploy.state import PoolStatus, is_gone, status, wait
from maas_ray.serve.spec.pools import ServeSpec
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.suggestions import known_names

FRONT_S = 180.0
"""Longest wait for Serve to start, and again for the front to know the pools."""
QUEUE_S = 1800.0
"""Longest wait for the deployment of somebody else."""


def deploy(
    spec: ServeSpec, timeout_s: float | None = None, say: Callable[[str], None] = lambda text: None
) -> list[PoolStatus]:
    """Deploys every pool of a spec and returns once each answers over HTTP. Pools of other specs are left alone.

    Deploying the same spec again changes nothing; deploying a changed one replaces replicas without a failed request. A
    pool that does not get there is taken back to what it was; the others are deployed all the same.

    Args:
        spec: the pools.
        timeout_s: longest time without one more ready replica; None: `rollout.timeout_s` of each pool.
        say: called with what is being done, line by line: what each pool needs, what is free, in which way it is updated.

    Raises:
        ClusterError: not connected to Ray, the cluster has another profile or port, or a pool did not get healthy in
            time and was taken back; the message holds the replica's own reason.
        ResourcesMissing: there is no room; says what is needed and what is free.
        NotFound: the registry has no such model, version or alias.
    """
    if not ray.is_initialized():
        raise ClusterError(
            "not connected to a Ray cluster; start one with `maas-ray up`, or call ray.init(address=...)"
        )
    store = open_store(spec.storage)
    _check_models(spec, store)
    front_s = FRONT_S if timeout_s is None else max(timeout_s, 1.0)
    spec = spec.model_copy(update={"storage": spec.storage.model_copy(update={"uri": store.uri})})
    with owner_of(uuid.uuid4().hex, spec, timeout_s, QUEUE_S, say) as owner:
        patiently(lambda: _open_front(spec, front_s), front_s)
        outcomes = follow(owner, say)
    if any(outcome.reason for outcome in outcomes):
        raise _failure(outcomes)
    deadline = time.monotonic() + front_s
    answers = with_reasons(lambda: _answers(spec)) if spec.profile == "fast" else lambda: _answers(spec)
    patiently(lambda: wait("the HTTP front", deadline, front_s, answers), front_s)
    unserved = _unserved(spec)
    return [replace(pool, unserved=unserved.get(pool.name, ())) for pool in status([pool.name for pool in spec.pools])]


def _open_front(spec: ServeSpec, timeout_s: float) -> None:
    _check_profile(spec, time.monotonic() + timeout_s)
    refuse_skew()
    try:
        _start_front(spec)
    except (ray.exceptions.RayError, *STARTING):
        refuse_without_front()
        raise


def _failure(outcomes: Iterable[PoolOutcome]) -> ClusterError:
    """What to raise where not all pools are as the spec says."""
    failed = [outcome for outcome in outcomes if outcome.reason]
    done = [outcome.pool for outcome in outcomes if not outcome.reason]
    texts = [f"{outcome.reason}; {outcome.what}" for outcome in failed]
    if done:
        texts.append(f"deployed as described: {', '.join(done)}")
    kind = ResourcesMissing if all(outcome.code == ResourcesMissing.code for outcome in failed) else ClusterError
    return kind("; ".join(texts))


def undeploy(names: Iterable[str], timeout_s: float = 120.0) -> None:
    """Drains and removes pools, also from the store's record of what is served.

    Raises:
        NotFound: there is no such pool; nothing was removed.
        ClusterError: a pool was not gone in time.
    """
    wanted = list(names)
    known = {pool.name for pool in status()}
    missing = sorted(set(wanted) - known)
    if missing:
        there = known_names(missing[0], sorted(known), "pools", "maas-ray status")
        raise NotFound(f"no pool {', '.join(missing)}; {there}")
    deadline = time.monotonic() + timeout_s
    specs = {name: standing.spec for name, standing in read_standings().items()}
    for name in wanted:
        delete_without_waiting(name)
    for name in wanted:
        wait(f"the end of pool {name!r}", deadline, timeout_s, lambda name=name: is_gone(name))  # type: ignore[misc]
        note(name, "")
        if (spec := specs.get(name)) is not None:
            forget(open_store(spec.storage), spec.cluster, [name])


def _check_models(spec: ServeSpec, store: ObstoreStore) -> None:
    """A name that does not exist is reported here and now, instead of after three failed starts of a replica."""
    # One that is a pattern may well match nothing yet.
    listed = [model for pool in spec.pools for model in pool.models if not model.is_pattern]
    for found in Registry(store).resolve_all((model.name, model.ref) for model in listed):
        if isinstance(found, MaasError):
            raise found
