"""The spec of a pool: models, replicas, autoscaling, placement, batching and limits."""

import re
from collections import Counter
from typing import Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from maas_ray.bundle.engine.engine import EngineSpec
from maas_ray.haproxy import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.registry.models import PRODUCTION
from maas_ray.serve.batching.spec import BatchSpec
from maas_ray.serve.controller.autoscaling import AutoscalingSpec, Resolved
from maas_ray.serve.spec.limits import LimitsSpec
from maas_ray.serve.spec.placement import PlacementSpec
from maas_ray.serve.spec.rollout import RolloutSpec
from maas_ray.serve.telemetry.access_log import AccessLogSpec
from maas_ray.serve.telemetry.tracing import TracingSpec
from maas_ray.spec import Spec
from maas_ray.store.objects import StorageSpec

_ROUTE = re.compile(r"/|(/[A-Za-z0-9][A-Za-z0-9._-]*)+")
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
"""Pattern of the names of pools and clusters."""
_NAME_OR_PATTERN = r"^[A-Za-z0-9*][A-Za-z0-9._*-]{0,99}$"
_MODELS_OF_A_PATTERN = 256
"""Number of models assumed for a pattern where a limit is derived from the number of models."""


class ServedModelSpec(Spec):
    """One served model: the version that an alias names, or a fixed version."""

    name: str = Field(pattern=_NAME_OR_PATTERN)
    """Name of the model in the registry and in URLs. With a `*` (`team-a-*`, or `*` for all), every model of the
    registry that has the alias, including those published later; each is loaded by its first request."""
    alias: str = PRODUCTION
    """Alias that running replicas follow: when it is promoted to another version, they load that version."""
    version: PositiveInt | None = None
    """Fixed version instead of an alias."""
    pinned: bool = False
    """Whether it is loaded at start and never evicted."""

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.version is not None and self.alias != PRODUCTION:
            raise ValueError("alias and version are both set; set only one")
        if self.version is not None and self.is_pattern:
            raise ValueError("a name with '*' matches many models; set an alias instead of a version")
        return self

    @property
    def is_pattern(self) -> bool:
        """Whether the name is a pattern for several models."""
        return "*" in self.name

    @property
    def ref(self) -> int | str:
        """Version or alias."""
        return self.alias if self.version is None else self.version


class ReplicaRange(Spec):
    """Limits of autoscaling."""

    min: NonNegativeInt = 1
    """Minimum replicas; with 0 the pool scales to zero after `autoscaling.scale_to_zero_after_s`, and a request
    restarts it."""
    max: PositiveInt
    """Maximum replicas."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class ResourcesSpec(Spec):
    """Resources of one replica; the CPUs also set the number of onnxruntime's threads."""

    cpus: PositiveFloat = 1.0
    """CPUs of one replica."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of one replica."""
    memory_bytes: PositiveInt | None = None
    """Free memory that a node must have for one replica; None: not considered."""


class RefreshSpec(Spec):
    """How running replicas follow the registry."""

    poll_interval_s: PositiveFloat = 2.0
    """Seconds between two reads of the registry: the delay until a promoted version is loaded."""
    timeout_s: PositiveFloat = 20.0
    """Maximum time of one read."""
    load_timeout_s: PositiveFloat = 300.0
    """Maximum time to read one version, create its session and warm it."""
    max_backoff_s: PositiveFloat = 60.0
    """Maximum pause after failures."""
    stuck_run_s: PositiveFloat | None = None
    """A longer run makes the replica unhealthy, so that it is replaced; None: `limits.timeout_s` plus 30 s, at least
    120 s."""
    max_parallel_loads: PositiveInt = 2
    """Concurrent loads in one replica; each uses about five times the size of its file while it loads."""


class ObservabilitySpec(Spec):
    """Access log and tracing of a pool's requests; metrics are always enabled."""

    access_log: AccessLogSpec = AccessLogSpec()
    tracing: TracingSpec = TracingSpec()


class ServingSpec(Spec):
    """A set of models and the replicas that serve it."""

    models: tuple[ServedModelSpec, ...] = Field(min_length=1)
    """Models to serve; if a name occurs twice, the first entry serves URLs without a version."""
    replicas: PositiveInt | ReplicaRange = 1
    """Fixed number of replicas, or limits of autoscaling."""
    autoscaling: AutoscalingSpec = AutoscalingSpec()
    """Autoscaling between the limits in `replicas`."""
    idempotent: bool = True
    """Whether a request may be computed twice. If so, HAProxy repeats a request whose replica dies while it holds
    it."""
    resources: ResourcesSpec = ResourcesSpec()
    placement: PlacementSpec = PlacementSpec()
    """Nodes that may run replicas, and how many replicas each."""
    batching: BatchSpec = BatchSpec()
    limits: LimitsSpec = LimitsSpec()
    refresh: RefreshSpec = RefreshSpec()
    observability: ObservabilitySpec = ObservabilitySpec()
    memory_budget_bytes: PositiveInt | None = None
    """Maximum memory for the models of one replica; above it the least recently used models are unloaded, and loaded
    again by their next request. A model counts as 1.1 times its file size plus 256 KiB. None: no limit."""
    strict_readiness: bool = False
    """Whether the pool is ready only while every listed model serves the version in the registry, like Triton's option
    of this name. If false, a model that cannot be loaded leaves the pool ready for the others."""
    server_name: str = Field(default="maas-ray", min_length=1, max_length=100)
    """Name in the server metadata. Some clients that were written for Triton require `triton`."""
    model_control: Literal["none", "explicit"] = "none"
    """`explicit`: clients may load and unload models with the v2 model repository extension. `none`: such requests are
    refused."""

    @model_validator(mode="after")
    def _models_are_unique(self) -> Self:
        seen = Counter((model.name, model.ref) for model in self.models)
        twice = sorted(f"{name} ({ref})" for (name, ref), times in seen.items() if times > 1)
        if twice:
            raise ValueError(f"the pool lists {', '.join(twice)} more than once")
        return self

    @model_validator(mode="after")
    def _target_can_be_exceeded(self) -> Self:
        target = self.autoscaling.target_ongoing
        if target is not None and target >= self._capacity:
            raise ValueError(
                f"autoscaling.target_ongoing {target:g} is never exceeded: a replica holds at most {self._capacity} "
                "requests of a model; lower it, or raise batching.max_queued_requests"
            )
        return self

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.stuck_run_s < self.limits.timeout_s:
            raise ValueError(
                f"refresh.stuck_run_s {self.stuck_run_s:g} is below limits.timeout_s {self.limits.timeout_s:g}: a "
                "replica would be replaced during a permitted run; omit stuck_run_s, raise it, or lower timeout_s"
            )
        if self.limits.max_body_bytes > self.batching.max_queued_bytes:
            raise ValueError(
                f"limits.max_body_bytes {self.limits.max_body_bytes} is above batching.max_queued_bytes "
                f"{self.batching.max_queued_bytes}: such a body would always be refused; lower one or raise the other"
            )
        return self

    @property
    def stuck_run_s(self) -> float:
        """`refresh.stuck_run_s`, or its derived value."""
        return (
            max(120.0, self.limits.timeout_s + 30.0) if self.refresh.stuck_run_s is None else self.refresh.stuck_run_s
        )

    @property
    def most_replicas(self) -> int:
        """Maximum number of replicas."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def max_ongoing_requests(self) -> int:
        """Serve's own limit of one replica, above the capacity of our queues: our 503, with its reason, is first."""
        num_models = sum(_MODELS_OF_A_PATTERN if model.is_pattern else 1 for model in self.models)
        return num_models * (self.batching.max_queued_requests + self.batching.max_batch_size) + 64

    @property
    def engine(self) -> EngineSpec:
        """Threads and warm-up sizes of every model, derived from a replica's resources and the largest batch."""
        largest = self.batching.max_batch_size
        sizes = {1 << power for power in range(largest.bit_length())}
        return EngineSpec(
            threads=max(1, int(self.resources.cpus)),
            instances=self.batching.instances
            or (2 if self.resources.gpus and not self.batching.cuda_graph_rows else 1),
            gpus=self.resources.gpus,
            cuda_graph_rows=self.batching.cuda_graph_rows,
            warmup_rows=tuple(sorted(sizes | {largest})),
        )

    @property
    def scaling(self) -> Resolved:
        """Autoscaling parameters without missing values."""
        return self.autoscaling.resolve(self.batching.max_batch_size, self._capacity)

    @property
    def _capacity(self) -> int:
        """Maximum number of waiting and running requests of one model version in one replica."""
        return self.batching.max_queued_requests + self.batching.max_batch_size

    @property
    def deployment_name(self) -> str:
        """Name of the Serve deployment, from which HAProxy's configuration derives whether requests may be repeated."""
        return REPLAYABLE if self.idempotent else NOT_REPLAYABLE


class PoolSpec(ServingSpec):
    """A pool: identical replicas that serve a set of models under one base path."""

    name: str = Field(default="default", pattern=NAME)
    """Name of the Serve application."""
    route_prefix: str = "/"
    """Base path of the protocol's paths, as in `/pools/a/v2/models/...`."""
    rollout: RolloutSpec = RolloutSpec()
    """How `maas-ray serve` updates the pool."""

    @field_validator("route_prefix")
    @classmethod
    def _is_route(cls, value: str) -> str:
        if not _ROUTE.fullmatch(value):
            raise ValueError("a route prefix is '/' or segments such as '/pools/a', without a trailing slash")
        if taken := {"v2", "metrics"}.intersection(value.split("/")):
            raise ValueError(
                f"a route prefix with {min(taken)!r} would hide paths of the protocol; choose another word"
            )
        return value


class ApplicationSpec(ServingSpec):
    """Arguments of the application builder: a pool without its name and base path, which Serve has."""

    storage: StorageSpec
    """Store of the registry and the bundles; a directory must be absolute and the same on every node."""
    cluster: str = Field(default="default", pattern=NAME)
    """Name of the cluster in the store's record of served pools, from which `maas-ray unserve` removes the pool."""

    @field_validator("storage")
    @classmethod
    def _is_absolute(cls, value: StorageSpec) -> StorageSpec:
        path = value.uri.removeprefix("file://")
        if ("://" not in value.uri or value.uri.startswith("file://")) and not path.startswith("/"):
            raise ValueError(
                f"the store {value.uri!r} is a relative directory, which each replica would resolve differently"
            )
        return value
