"""Pools on a Ray cluster: deploy, look, undeploy, and the builder that `serve deploy` calls. Every wait is bounded."""

import os
import re
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import ray
import requests
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatus, ApplicationStatusOverview

import maas_ray
from maas_ray.addresses import http_url, reachable_host
from maas_ray.cluster.environment import LOOPBACK
from maas_ray.cluster.unavailable import unavailable
from maas_ray.display import get_logger
from maas_ray.errors import ClusterError, NotFound
from maas_ray.haproxy import HOST_FILE_VARIABLE
from maas_ray.registry.models import Registry
from maas_ray.serve.autoscale import METRICS_INTERVAL_S, Scaler
from maas_ray.serve.replica import deployment
from maas_ray.serve.spec import ApplicationSpec, PoolSpec, ReplicaRange, ServeSpec, ServingSpec
from maas_ray.spec import canonical_json, parse_spec
from maas_ray.store.objects import ObstoreStore, open_store

POLL_S = 0.25
RETRY_S = 2.0
CONTROLLER_TIMEOUT_S = 30.0
GRPC_METHODS = "maas_ray.serve.grpc.entry:add_to_server"
_STARTING = (ray.exceptions.RayActorError, RayServeException, TimeoutError)
"""What Serve raises when one of its own actors died or did not answer in time."""
_REASON = re.compile(r"^(?:maas_ray\.errors\.\w+|[\w.]*(?:Error|Exception)): (.+)$", re.MULTILINE)

log = get_logger(__name__)


@dataclass(frozen=True)
class PoolStatus:
    """A pool as Serve sees it."""

    name: str
    status: str
    """Serve's word: `RUNNING`, `DEPLOYING`, `DEPLOY_FAILED`, `UNHEALTHY`, `DELETING`, …"""
    route_prefix: str
    num_running: int
    """Replicas that answer."""
    message: str
    """Why it is not healthy; empty if it is."""
    unserved: tuple[str, ...] = ()
    """Models that it cannot serve although it is healthy, each with the reason; filled by `deploy`."""


def build(args: dict[str, Any]) -> serve.Application:
    """The application builder that a Serve config names as `maas_ray.serve.pool:build`.

    Args:
        args: the `args` of the application in the config: an `ApplicationSpec`.

    Raises:
        SpecError: the arguments are not valid; Serve shows the message as the application's.
    """
    return _bind(parse_spec(ApplicationSpec, args, source="args"))


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
        serve.RunTarget(_bind(_application(pool, storage)), name=pool.name, route_prefix=pool.route_prefix)
        for pool in spec.pools
    ]
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    for pool in spec.pools:
        _wait(f"pool {pool.name!r}", deadline, timeout_s, lambda pool=pool: _is_running(pool.name))  # type: ignore[misc]
    _wait("the HTTP front", deadline, timeout_s, lambda: _answers(spec))
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
        _wait(f"the end of pool {name!r}", deadline, timeout_s, lambda name=name: _is_gone(name))  # type: ignore[misc]


def status(names: Iterable[str] | None = None) -> list[PoolStatus]:
    """Pools by name, all of the cluster or those of `names` that exist."""
    if not ray.is_initialized():
        raise ClusterError(
            "not connected to a Ray cluster; start one with `maas-ray up`, or call ray.init(address=...)"
        )
    wanted = None if names is None else set(names)
    applications = serve.status().applications
    routes = _routes()
    return [
        PoolStatus(
            name=name,
            status=str(application.status.value),
            route_prefix=routes.get(name, ""),
            num_running=sum(item.replica_states.get("RUNNING", 0) for item in application.deployments.values()),
            message="" if application.status == ApplicationStatus.RUNNING else _reason(application),
        )
        for name, application in applications.items()
        if wanted is None or name in wanted
    ]


def _line(error: Exception) -> str:
    """What an error says, in one line: Ray describes a dead actor on several."""
    return " ".join(str(error).split())[:500]


def _bind(spec: ApplicationSpec) -> serve.Application:
    options: dict[str, object] = {
        # The same description gives the same version, so that deploying it again restarts nothing.
        "version": _version(spec),
        "_internal": True,
        "name": spec.deployment_name,
        "max_ongoing_requests": spec.max_ongoing_requests,
        "ray_actor_options": _actor_options(spec),
        "graceful_shutdown_timeout_s": spec.limits.drain_s + 15.0,
        "health_check_period_s": 5.0,
        "max_constructor_retry_count": 3,
        # New replicas first: with Serve's default of 0 a pool of one replica is away during a roll-out.
        "max_surge_percent": 100,
        "logging_config": {"enable_access_log": False},
    }
    if isinstance(spec.replicas, ReplicaRange):
        options["num_replicas"] = None
        options["autoscaling_config"] = _autoscaling(spec, spec.replicas)
    else:
        options["num_replicas"] = spec.replicas
    application: serve.Application = deployment.options(**options).bind(spec.model_dump(mode="json"))
    return application


def _autoscaling(spec: ApplicationSpec, bounds: ReplicaRange) -> AutoscalingConfig:
    wanted = spec.scaling
    policy = AutoscalingPolicy(
        policy_function=f"{Scaler.__module__}:{Scaler.__name__}", policy_kwargs=wanted.scaler_options()
    )
    with warnings.catch_warnings():
        # Serve calls it deprecated, but the variables that are to replace it are read by nothing in 2.60.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=bounds.min,
            max_replicas=bounds.max,
            target_ongoing_requests=wanted.target_ongoing,
            look_back_period_s=wanted.look_back_s,
            metrics_interval_s=METRICS_INTERVAL_S,
            # Our policy has its own delays, which look at all that was needed meanwhile and not only at the last moment.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=policy,
        )


def _application(pool: PoolSpec, storage: object) -> ApplicationSpec:
    shared = {name: getattr(pool, name) for name in ServingSpec.model_fields}
    return ApplicationSpec.model_validate({**shared, "storage": storage})


def _version(args: ApplicationSpec) -> str:
    """Stands for everything that a replica is started with; how many there are is not part of it."""
    content = args.model_dump(mode="json", exclude={"replicas", "autoscaling"})
    return sha256(canonical_json({"spec": content, "code": maas_ray.__version__})).hexdigest()[:16]


def _actor_options(args: ApplicationSpec) -> dict[str, object]:
    options: dict[str, object] = {"num_cpus": args.resources.cpus, "num_gpus": args.resources.gpus}
    if args.resources.memory_bytes is not None:
        options["memory"] = args.resources.memory_bytes
    return options


def _check_models(spec: ServeSpec, store: ObstoreStore) -> None:
    """A name that does not exist is reported here and now, instead of after three failed starts of a replica."""
    registry = Registry(store)
    for pool in spec.pools:
        for model in pool.models:
            if model.is_pattern:
                continue  # it may well match nothing yet
            registry.resolve(model.name, model.ref)


def _environment(name: str) -> str:
    """Runs on a node: what its processes were started with."""
    return os.environ.get(name, "")


def _check_profile(spec: ServeSpec, deadline: float) -> None:
    wants = "1" if spec.profile == "fast" else "0"
    answer = ray.remote(num_cpus=0)(_environment).remote("RAY_SERVE_ENABLE_HA_PROXY")
    try:
        has = ray.get(answer, timeout=max(1.0, deadline - time.monotonic()))
    except ray.exceptions.GetTimeoutError as error:
        raise ClusterError("the cluster did not run a small task in time; look at `ray status`") from error
    if (has or "0") != wants:
        other = "portable" if spec.profile == "fast" else "fast"
        raise ClusterError(
            f"the spec has profile {spec.profile!r}, the cluster was started with {other!r}: set profile: {other} in the "
            f"spec, or start the cluster again with `maas-ray up --profile {spec.profile}`"
        )


def _start_front(spec: ServeSpec) -> None:
    host = spec.http.host
    host_file = os.environ.get(HOST_FILE_VARIABLE) if spec.profile == "fast" else None
    if host_file:
        # A cluster on this machine alone: only HAProxy listens outside. Serve's own option would open the replicas too.
        _choose_host(Path(host_file), host)
        host = LOOPBACK
    http: dict[str, object] = {"host": host, "port": spec.http.port}
    if spec.http.tls is not None:
        http |= {"ssl_certfile": spec.http.tls.certificate, "ssl_keyfile": spec.http.tls.key}
    grpc = None
    if spec.grpc is not None:
        # Not Serve's reflection: it would describe the messages by names of ours; GRPC_METHODS brings one of its own.
        grpc = {"port": spec.grpc.port, "grpc_servicer_functions": [GRPC_METHODS], "enable_reflection": False}
    serve.start(proxy_location="EveryNode", http_options=http, grpc_options=grpc)
    found = _get_global_client().http_config
    if (found.host, found.port) != (host, spec.http.port):
        raise ClusterError(
            f"Serve listens on {found.host}:{found.port} already, the spec says {host}:{spec.http.port}; "
            "use the same address, or run `serve shutdown` first"
        )
    _check_grpc(spec)


def _check_grpc(spec: ServeSpec) -> None:
    if spec.grpc is None:
        return
    found = ray.get(_get_global_client()._controller.get_grpc_config.remote(), timeout=CONTROLLER_TIMEOUT_S)
    if GRPC_METHODS not in found.grpc_servicer_functions or found.port != spec.grpc.port:
        listens = f"has gRPC on port {found.port}" if found.grpc_servicer_functions else "was started without gRPC"
        raise ClusterError(
            f"Serve {listens} already, the spec says port {spec.grpc.port}; use the same, or run `serve shutdown` first"
        )


def _choose_host(path: Path, host: str) -> None:
    if _get_global_client(raise_if_no_controller_running=False) is not None and path.exists():
        found = path.read_text().strip()
        if found != host:
            raise ClusterError(
                f"Serve listens on {found} already, the spec says {host}; use the same address, or run `serve shutdown` first"
            )
        return
    path.write_text(host + "\n")


def _wait(what: str, deadline: float, timeout_s: float, is_done: Callable[[], str]) -> None:
    """Polls until `is_done` returns an empty string; what it returned last is the reason of a timeout."""
    while missing := is_done():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} was not there within {timeout_s:g} s: {missing}")
        time.sleep(POLL_S)


def _is_running(name: str) -> str:
    application = serve.status().applications.get(name)
    if application is None:
        return "Serve does not list it yet"
    if application.status == ApplicationStatus.RUNNING:
        return ""
    reason = _reason(application)
    if application.status == ApplicationStatus.DEPLOY_FAILED:
        raise ClusterError(f"pool {name!r} cannot be deployed: {reason}")
    return f"{application.status.value}: {reason or 'Serve gives no reason'}"


def _is_gone(name: str) -> str:
    application = serve.status().applications.get(name)
    return "" if application is None else f"it is {application.status.value}"


def _answers(spec: ServeSpec) -> str:
    """Empty once every pool is ready through the proxy of this machine, or this machine has none."""
    proxies = serve.status().proxies
    waiting = sorted(f"{node}: {state.value}" for node, state in proxies.items() if state.value != "HEALTHY")
    if waiting or not proxies:
        return f"proxies are not healthy: {', '.join(waiting) or 'none has started'}"
    if spec.http.tls is not None or ray.get_runtime_context().get_node_id() not in proxies:
        return ""
    front = http_url(reachable_host(spec.http.host), spec.http.port)
    session = requests.Session()
    session.trust_env = False  # the cluster's own address is never reached through a proxy
    for pool in spec.pools:
        url = f"{front}{pool.route_prefix.rstrip('/')}/v2/health/ready"
        try:
            answer = session.get(url, timeout=5)
        except requests.RequestException as error:
            return f"{url} does not answer ({type(error).__name__})"
        if answer.status_code != 200:
            return f"{url} answers {answer.status_code}"
    return ""


def _unserved(spec: ServeSpec) -> dict[str, tuple[str, ...]]:
    """Models by pool that are not available, as the pool's own index says through the proxy of this machine."""
    if spec.http.tls is not None or ray.get_runtime_context().get_node_id() not in serve.status().proxies:
        return {}
    front = http_url(reachable_host(spec.http.host), spec.http.port)
    found: dict[str, tuple[str, ...]] = {}
    for pool in spec.pools:
        if isinstance(pool.replicas, ReplicaRange) and pool.replicas.min == 0:
            continue  # it may sleep, and a question is no reason to wake it
        found[pool.name] = unavailable(front, pool.route_prefix, 30)
    return found


def _reason(application: ApplicationStatusOverview) -> str:
    """The replica's own words where there are any: the last error line of the traceback that Serve reports."""
    texts = [application.message, *(item.message for item in application.deployments.values())]
    for text in reversed(texts):
        if found := _REASON.findall(text):
            return str(found[-1])
    return "; ".join(text.strip() for text in dict.fromkeys(texts) if text.strip())[-2000:]


def _routes() -> dict[str, str]:
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    applications = client.get_serve_details()["applications"]
    return {name: details.get("route_prefix") or "" for name, details in applications.items()}
