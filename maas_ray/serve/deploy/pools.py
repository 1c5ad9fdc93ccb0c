"""Deploys and removes pools. Every wait is bounded."""

import time
from collections.abc import Iterable
from dataclasses import replace

import ray
from ray import serve
from ray.serve.context import _disconnect
from ray.serve.exceptions import RayServeException

from maas_ray.display import get_logger
from maas_ray.errors import ClusterError, NotFound
from maas_ray.registry.models import Registry
from maas_ray.serve.deploy.binding import application_spec, bind
from maas_ray.serve.deploy.front import _answers, _check_profile, _start_front, _unserved
from maas_ray.serve.deploy.state import PoolStatus, is_gone, is_running, status, wait
from maas_ray.serve.spec import ServeSpec
from maas_ray.store.objects import ObstoreStore, open_store

RETRY_S = 2.0
_STARTING = (ray.exceptions.RayActorError, RayServeException, TimeoutError)
"""What Serve raises when one of its own actors died or did not answer in time."""

log = get_logger(__name__)


def deploy(spec: ServeSpec, timeout_s: float = 180.0) -> list[PoolStatus]:
    """Deploys every pool of a spec and returns once each answers over HTTP. Pools of other specs are left alone.

    Deploying the same spec again changes nothing; deploying a changed one replaces replicas without a failed request.

    Args:
        spec: the pools.
        timeout_s: longest wait for all of them together.

    Raises:
        ClusterError: not connected to Ray, the cluster has another profile or port, or a pool did not get healthy in
            time; the message holds the replica's own reason.
        NotFound: the registry has no such model, version or alias.
    """
    if not ray.is_initialized():
        raise ClusterError(
            "not connected to a Ray cluster; start one with `maas-ray up`, or call ray.init(address=...)"
        )
    deadline = time.monotonic() + timeout_s
    store = open_store(spec.storage)
    _check_models(spec, store)
    while True:
        try:
            return _deploy(spec, store, deadline, timeout_s)
        except _STARTING as error:
            # Serve starts its own actors again; on a busy machine some do not come up at the first go.
            log.warning("an actor of Ray Serve was lost while the pools were deployed, trying again: %s", _line(error))
            if time.monotonic() + RETRY_S > deadline:
                raise ClusterError(
                    f"Ray Serve lost an actor while the pools were deployed, and not all answered within {timeout_s:g} s: "
                    f"{_line(error)}; the machine may be too busy or short of memory (see `ray status`): deploy again, "
                    "with a larger --timeout-s"
                ) from error
            _disconnect()  # from a controller that may be dead
            time.sleep(RETRY_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray failed while the pools were deployed: {_line(error)}; see `ray status`") from error


def _deploy(spec: ServeSpec, store: ObstoreStore, deadline: float, timeout_s: float) -> list[PoolStatus]:
    _check_profile(spec, deadline)
    _start_front(spec)
    storage = spec.storage.model_copy(update={"uri": store.uri})
    targets = [
        serve.RunTarget(bind(application_spec(pool, storage)), name=pool.name, route_prefix=pool.route_prefix)
        for pool in spec.pools
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    for pool in spec.pools:
        wait(f"pool {pool.name!r}", deadline, timeout_s, lambda pool=pool: is_running(pool.name))  # type: ignore[misc]
    wait("the HTTP front", deadline, timeout_s, lambda: _answers(spec))
    unserved = _unserved(spec)
    return [replace(pool, unserved=unserved.get(pool.name, ())) for pool in status([pool.name for pool in spec.pools])]


def undeploy(names: Iterable[str], timeout_s: float = 120.0) -> None:
    """Drains and removes pools.

    Raises:
        NotFound: there is no such pool; nothing was removed.
        ClusterError: a pool was not gone in time.
    """
    wanted = list(names)
    known = {pool.name for pool in status()}
    missing = sorted(set(wanted) - known)
    if missing:
        raise NotFound(f"no pool {', '.join(missing)}; there is: {', '.join(sorted(known)) or 'none'}")
    deadline = time.monotonic() + timeout_s
    for name in wanted:
        serve.delete(name, _blocking=False)
    for name in wanted:
        wait(f"the end of pool {name!r}", deadline, timeout_s, lambda name=name: is_gone(name))  # type: ignore[misc]


def _check_models(spec: ServeSpec, store: ObstoreStore) -> None:
    """A name that does not exist is reported here and now, instead of after three failed starts of a replica."""
    registry = Registry(store)
    for pool in spec.pools:
        for model in pool.models:
            if model.is_pattern:
                continue  # it may well match nothing yet
            registry.resolve(model.name, model.ref)


def _line(error: Exception) -> str:
    """What an error says, in one line: Ray describes a dead actor on several."""
    return " ".join(str(error).split())[:500]
