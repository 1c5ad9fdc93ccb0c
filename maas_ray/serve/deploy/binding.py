"""Builds the Serve application of a pool: deployment options, version and autoscaling configuration."""

import warnings
from hashlib import sha256

from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from maas_ray.ray_internals.serve import version_options
from maas_ray.serve.controller.autoscaling import Resolved, Scaler, report_interval_s
from maas_ray.serve.deploy.way import FIRST_START, Way
from maas_ray.serve.replica.replica import Ingress
from maas_ray.serve.spec.pools import ApplicationSpec, PoolSpec, ReplicaRange, ServingSpec
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import canonical_json
from maas_ray.version import __version__


def bind(spec: ApplicationSpec, way: Way = FIRST_START) -> serve.Application:
    """Returns the application of a pool, to be run under the pool's name and base path.

    Args:
        spec: spec of the pool.
        way: how Serve replaces replicas of another version.
    """
    options: dict[str, object] = {
        # Equal descriptions have equal versions, so that deploying one again restarts nothing.
        **version_options(version_of(spec)),
        "name": spec.deployment_name,
        "max_ongoing_requests": spec.max_ongoing_requests,
        "ray_actor_options": _actor_options(spec),
        "graceful_shutdown_timeout_s": spec.limits.drain_s + 15.0,
        "health_check_period_s": 5.0,
        "max_constructor_retry_count": 3,
        "max_surge_percent": way.surge_percent,
        "logging_config": {"enable_access_log": False},
    }
    if spec.placement.strategy == "one_per_node":
        options["max_replicas_per_node"] = 1
    if isinstance(spec.replicas, ReplicaRange):
        options["num_replicas"] = None
        options["autoscaling_config"] = autoscaling_config(spec.scaling, spec.replicas)
    else:
        options["num_replicas"] = spec.replicas
    deployment = serve.deployment(rolling_update_percentage=way.step)(Ingress)
    application: serve.Application = deployment.options(**options).bind(spec.model_dump(mode="json"))
    return application


def autoscaling_config(wanted: Resolved, bounds: ReplicaRange) -> AutoscalingConfig:
    """Returns Serve's autoscaling configuration of a pool with a range of replicas."""
    interval_s = report_interval_s(bounds.max)
    policy = AutoscalingPolicy(
        policy_function=f"{Scaler.__module__}:{Scaler.__name__}", policy_kwargs=wanted.scaler_options()
    )
    with warnings.catch_warnings():
        # Serve calls it deprecated, but nothing in 2.60 reads the variables that are to replace it.
        warnings.filterwarnings("ignore", message="The `metrics_interval_s` field", category=DeprecationWarning)
        return AutoscalingConfig(
            min_replicas=bounds.min,
            max_replicas=bounds.max,
            target_ongoing_requests=wanted.target_ongoing,
            look_back_period_s=max(wanted.look_back_s, 1.2 * interval_s),  # Serve requires at least one report in it
            metrics_interval_s=interval_s,
            # Our policy has its own delays, which consider the load of the whole delay and not only of its last moment.
            upscale_delay_s=0.0,
            downscale_delay_s=0.0,
            policy=policy,
        )


def application_spec(pool: PoolSpec, spec: ServeSpec) -> ApplicationSpec:
    """Returns the application spec of a pool, with an absolute store, as its replicas receive it."""
    shared = {name: getattr(pool, name) for name in ServingSpec.model_fields}
    return ApplicationSpec.model_validate({**shared, "storage": spec.storage, "cluster": spec.cluster})


def version_of(args: ApplicationSpec) -> str:
    """Returns a digest of everything that a replica is started with, without the number of replicas."""
    content = args.model_dump(mode="json", exclude={"replicas", "autoscaling", "cluster"})
    return sha256(canonical_json({"spec": content, "code": __version__})).hexdigest()[:16]


def _actor_options(args: ApplicationSpec) -> dict[str, object]:
    options: dict[str, object] = {"num_cpus": args.resources.cpus, "num_gpus": args.resources.gpus}
    if args.resources.memory_bytes is not None:
        options["memory"] = args.resources.memory_bytes
    if args.placement.labels:
        options["label_selector"] = dict(args.placement.labels)
    if args.placement.accelerator is not None:
        options["accelerator_type"] = args.placement.accelerator
    return options
