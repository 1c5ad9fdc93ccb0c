"""Deploys and removes pools. Every wait has a time limit."""

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
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.suggestions import known_names

FRONT_S = 180.0
"""Maximum seconds until Serve has started, and again until the front has the routes of the pools."""
QUEUE_S = 1800.0
"""Maximum seconds of waiting for another deployment."""


def deploy(
    spec: ServeSpec, timeout_s: float | None = None, say: Callable[[str], None] = lambda text: None
) -> list[PoolStatus]:
    """Deploys every pool of a spec and returns once each answers over HTTP. Pools of other specs are not changed.

    Deploying the same spec again changes nothing; deploying a changed one replaces replicas without a failed request. A
    pool whose deployment fails is rolled back; the others are deployed anyway.

    Args:
        spec: spec of the pools.
        timeout_s: maximum time without an additional ready replica; None: `rollout.timeout_s` of each pool.
        say: receives progress lines: required resources, free resources and rollout steps of each pool.

    Raises:
        ClusterError: not connected to Ray, the cluster has another profile or port, or a pool did not become healthy in
            time and was rolled back; the message contains the replica's own reason.
        ResourcesMissing: not enough free resources; names the required and the free ones.
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
    patiently(lambda: wait("the start of the HTTP front", deadline, front_s, answers), front_s)
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
    """Returns the error to raise if a pool is not as in the spec."""
    failed = [outcome for outcome in outcomes if outcome.reason]
    done = [outcome.pool for outcome in outcomes if not outcome.reason]
    texts = [f"{outcome.reason}; {outcome.what}" for outcome in failed]
    if done:
        texts.append(f"deployed as specified: {', '.join(done)}")
    kind = ResourcesMissing if all(outcome.code == ResourcesMissing.code for outcome in failed) else ClusterError
    return kind("; ".join(texts))


def undeploy(names: Iterable[str], timeout_s: float = 120.0) -> None:
    """Drains and removes pools, also from the store's record of served pools.

    Raises:
        NotFound: there is no such pool; nothing was removed.
        ClusterError: a pool was not removed in time.
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
        wait(f"the removal of pool {name!r}", deadline, timeout_s, lambda name=name: is_gone(name))  # type: ignore[misc]
        note(name, "")
        if (spec := specs.get(name)) is not None:
            forget(open_store(spec.storage), spec.cluster, [name])


def _check_models(spec: ServeSpec, store: ObstoreStore) -> None:
    """Raises an error for a missing model now, instead of after three failed starts of a replica."""
    # A pattern may match nothing yet.
    listed = [model for pool in spec.pools for model in pool.models if not model.is_pattern]
    for found in Registry(store).resolve_all((model.name, model.ref) for model in listed):
        if isinstance(found, MaasError):
            raise found
