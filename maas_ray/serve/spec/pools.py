"""What a deployment says: the store, the HTTP front and the pools. Validation only; starts nothing."""

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
from maas_ray.cluster.node.environment import MAX_ANSWER_S
from maas_ray.haproxy import NOT_REPLAYABLE, REPLAYABLE
from maas_ray.registry.models import PRODUCTION
from maas_ray.serve.batching.spec import BatchSpec
from maas_ray.serve.controller.autoscaling import AutoscalingSpec, Resolved
from maas_ray.serve.spec.cors import check_origin
from maas_ray.serve.spec.placement import PlacementSpec
from maas_ray.serve.spec.rollout import RolloutSpec
from maas_ray.serve.telemetry.access_log import AccessLogSpec
from maas_ray.serve.telemetry.tracing import TracingSpec
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.spec import Spec
from maas_ray.store.objects import StorageSpec

_ROUTE = re.compile(r"/|(/[A-Za-z0-9][A-Za-z0-9._-]*)+")
_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]*|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$"
_NAME_OR_PATTERN = r"^[A-Za-z0-9*][A-Za-z0-9._*-]{0,99}$"
_MODELS_OF_A_PATTERN = 256
"""How many models a pattern is taken to stand for, where a bound is derived from the number of models."""


class ServedModelSpec(Spec):
    """One served model reference: whatever an alias names, or one fixed version."""

    name: str = Field(pattern=_NAME_OR_PATTERN)
    """Model in the registry, and in the URL. With a `*` (`team-a-*`, or `*` for all) every model of the registry that
    has the alias, also those published later; each is loaded by its first request."""
    alias: str = PRODUCTION
    """Followed by running replicas: promoting another version swaps it in."""
    version: PositiveInt | None = None
    """A fixed version instead of an alias."""
    pinned: bool = False
    """Loaded at start, and never unloaded to make room for another model."""

    @model_validator(mode="after")
    def _one_reference(self) -> Self:
        if self.version is not None and self.alias != PRODUCTION:
            raise ValueError("give an alias or a version, not both")
        if self.version is not None and self.is_pattern:
            raise ValueError("a name with '*' stands for many models; give an alias instead of a version")
        return self

    @property
    def is_pattern(self) -> bool:
        """Whether the name stands for every model that it matches."""
        return "*" in self.name

    @property
    def ref(self) -> int | str:
        """The version or the alias."""
        return self.alias if self.version is None else self.version


class ReplicaRange(Spec):
    """Bounds of autoscaling."""

    min: NonNegativeInt = 1
    """Replicas that always run; with 0 the pool sleeps after `autoscaling.scale_to_zero_after_s`, and a request wakes it."""
    max: PositiveInt
    """Replicas at most."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max {self.max} is below min {self.min}")
        return self


class ResourcesSpec(Spec):
    """What one replica owns; also the number of onnxruntime's threads."""

    cpus: PositiveFloat = 1.0
    """CPUs of one replica."""
    gpus: NonNegativeFloat = 0.0
    """GPUs of one replica."""
    memory_bytes: PositiveInt | None = None
    """Memory that a node must have free for one replica; None: not counted."""


class LimitsSpec(Spec):
    """What one request may take."""

    max_body_bytes: PositiveInt = 16 << 20
    """Largest request body; a larger one is answered 413 without being parsed."""
    max_answer_bytes: PositiveInt = MAX_ANSWER_BYTES
    """Most bytes of an answer's tensors; a larger answer is refused (422) before it is written. With a value of a request a
    model may give far more than it was sent."""
    timeout_s: PositiveFloat = Field(default=30.0, le=MAX_ANSWER_S)
    """Longest time to an answer; `x-request-timeout-ms` may ask for less, never for more."""
    drain_timeout_s: PositiveFloat | None = None
    """Time that a stopping replica has to answer what waits; None: as long as `timeout_s`. A shorter one would cut
    requests that may still run."""
    io_timeout_s: PositiveFloat = 8.0
    """Time in which a head must be complete, and over which the speed of a body and of a reader is taken."""
    min_bytes_per_s: PositiveInt = 16 << 10
    """Speed below which a body or a reader trickles; its connection is closed."""
    idle_timeout_s: PositiveFloat = 120.0
    """Time after which a connection without a request is closed; longer than what is in front of it keeps one."""
    cors_origins: tuple[str, ...] = ()
    """Origins (`https://shop.example`) whose pages may call this pool from a browser, or `*` for all; none by default."""
    max_connections: PositiveInt = 10_000
    """Connections of one replica, fewer where its process may not open so many files; one more is answered 503 and closed."""

    @property
    def drain_s(self) -> float:
        """`drain_timeout_s`, derived where it is not given."""
        return self.timeout_s if self.drain_timeout_s is None else self.drain_timeout_s

    @model_validator(mode="after")
    def _drain_outlasts_a_request(self) -> Self:
        if self.drain_s < self.timeout_s:
            raise ValueError(
                f"drain_timeout_s {self.drain_s:g} is below timeout_s {self.timeout_s:g}: a replica that stops would cut "
                "requests that may still run; leave drain_timeout_s out, raise it, or lower timeout_s"
            )
        return self

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_origin(origin) for origin in value)


class RefreshSpec(Spec):
    """How running replicas follow the registry."""

    poll_interval_s: PositiveFloat = 2.0
    """Seconds between two looks at the registry: how fast a promoted alias is picked up."""
    timeout_s: PositiveFloat = 20.0
    """Longest wait for one look."""
    load_timeout_s: PositiveFloat = 300.0
    """Longest wait for one version to be read, made into a session and warmed."""
    max_backoff_s: PositiveFloat = 60.0
    """Longest pause after failures."""
    stuck_run_s: PositiveFloat | None = None
    """A run that lasts longer makes the replica unhealthy, so that it is replaced; None: 30 s more than
    `limits.timeout_s`, at least 120 s."""
    max_parallel_loads: PositiveInt = 2
    """Versions that one replica loads at the same time; each takes about five times its file while it is loaded."""


class ObservabilitySpec(Spec):
    """What a pool tells about its requests, beyond its metrics, which are always there."""

    access_log: AccessLogSpec = AccessLogSpec()
    tracing: TracingSpec = TracingSpec()


class ServingSpec(Spec):
    """A set of models and the replicas that serve it."""

    models: tuple[ServedModelSpec, ...] = Field(min_length=1)
    """What is served; where a model is listed twice, a URL without a version means the first."""
    replicas: PositiveInt | ReplicaRange = 1
    """A fixed number, or bounds."""
    autoscaling: AutoscalingSpec = AutoscalingSpec()
    """How the number moves between the bounds."""
    idempotent: bool = True
    """Whether a request may be computed twice. Behind HAProxy it then is when its replica dies while it holds it."""
    resources: ResourcesSpec = ResourcesSpec()
    placement: PlacementSpec = PlacementSpec()
    """Which nodes have replicas, and how many of them."""
    batching: BatchSpec = BatchSpec()
    limits: LimitsSpec = LimitsSpec()
    refresh: RefreshSpec = RefreshSpec()
    observability: ObservabilitySpec = ObservabilitySpec()
    memory_budget_bytes: PositiveInt | None = None
    """Memory for the models of one replica; beyond it the ones not used for longest are unloaded, and loaded again by
    their next request. A model counts as 1.1 times its file and 256 KiB. None: every model stays, without a limit."""
    strict_readiness: bool = False
    """Whether the pool is ready only while every model that it lists serves what the registry names, as Triton's option
    of this name. Otherwise one model that does not load leaves the pool ready for the others."""
    server_name: str = Field(default="maas-ray", min_length=1, max_length=100)
    """Name in the server's metadata. Some clients that were written for Triton insist on `triton`."""
    model_control: Literal["none", "explicit"] = "none"
    """`explicit`: callers may load and unload models with the v2 model repository extension. `none`: they are refused."""

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
                f"autoscaling.target_ongoing {target:g} is never exceeded: a replica holds {self._capacity} requests of a "
                "model at most; lower it, or raise batching.max_queued_requests"
            )
        return self

    @model_validator(mode="after")
    def _limits_agree(self) -> Self:
        if self.stuck_run_s < self.limits.timeout_s:
            raise ValueError(
                f"refresh.stuck_run_s {self.stuck_run_s:g} is below limits.timeout_s {self.limits.timeout_s:g}: a replica "
                "would be killed during a run that is allowed; leave stuck_run_s out, raise it, or lower timeout_s"
            )
        if self.limits.max_body_bytes > self.batching.max_queued_bytes:
            raise ValueError(
                f"limits.max_body_bytes {self.limits.max_body_bytes} is above batching.max_queued_bytes "
                f"{self.batching.max_queued_bytes}: such a body would always be refused; lower one or raise the other"
            )
        return self

    @property
    def stuck_run_s(self) -> float:
        """`refresh.stuck_run_s`, derived where it is not given."""
        return (
            max(120.0, self.limits.timeout_s + 30.0) if self.refresh.stuck_run_s is None else self.refresh.stuck_run_s
        )

    @property
    def most_replicas(self) -> int:
        """Replicas that may run at most."""
        return self.replicas.max if isinstance(self.replicas, ReplicaRange) else self.replicas

    @property
    def max_ongoing_requests(self) -> int:
        """Serve's own limit of one replica, set above what our queues hold: our 503 comes first, with its reason."""
        num_models = sum(_MODELS_OF_A_PATTERN if model.is_pattern else 1 for model in self.models)
        return num_models * (self.batching.max_queued_requests + self.batching.max_batch_size) + 64

    @property
    def engine(self) -> EngineSpec:
        """Threads and warm-up sizes of every model, from what a replica owns and the largest batch."""
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
        """Every number of autoscaling."""
        return self.autoscaling.resolve(self.batching.max_batch_size, self._capacity)

    @property
    def _capacity(self) -> int:
        """Requests of one model version that wait or run in one replica, at most."""
        return self.batching.max_queued_requests + self.batching.max_batch_size

    @property
    def deployment_name(self) -> str:
        """Name of the Serve deployment, by which HAProxy's configuration tells what it may repeat."""
        return REPLAYABLE if self.idempotent else NOT_REPLAYABLE


class PoolSpec(ServingSpec):
    """A pool: identical replicas that serve a set of models under one base path."""

    name: str = Field(default="default", pattern=_NAME)
    """Name of the Serve application."""
    route_prefix: str = "/"
    """Base path; the protocol is below it, as in `/pools/a/v2/models/...`."""
    rollout: RolloutSpec = RolloutSpec()
    """How `maas-ray serve` updates the pool."""

    @field_validator("route_prefix")
    @classmethod
    def _is_route(cls, value: str) -> str:
        if not _ROUTE.fullmatch(value):
            raise ValueError("a route prefix is '/' or segments such as '/pools/a', without a slash at the end")
        if taken := {"v2", "metrics"}.intersection(value.split("/")):
            raise ValueError(
                f"a route prefix with {min(taken)!r} would take paths of the protocol; choose another word"
            )
        return value


class ApplicationSpec(ServingSpec):
    """A pool as the application builder takes it: Serve itself knows its name and base path."""

    storage: StorageSpec
    """The store of the registry and the bundles; a directory must be absolute and the same on every node."""
    cluster: str = Field(default="default", pattern=_NAME)
    """Name of the cluster in the store's record of what is served, from which `maas-ray unserve` removes the pool."""

    @field_validator("storage")
    @classmethod
    def _is_absolute(cls, value: StorageSpec) -> StorageSpec:
        path = value.uri.removeprefix("file://")
        if ("://" not in value.uri or value.uri.startswith("file://")) and not path.startswith("/"):
            raise ValueError(
                f"the store {value.uri!r} is a relative directory, which each replica would read differently"
            )
        return value


class TlsSpec(Spec):
    """TLS at Serve's own proxy."""

    certificate: str
    """Path of the PEM certificate chain, the same on every node."""
    key: str
    """Path of the PEM private key."""


class HttpSpec(Spec):
    """The HTTP front of the cluster, shared by all pools."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable from this machine only."""
    port: int = Field(default=8000, ge=1, le=65535)
    tls: TlsSpec | None = None

    @field_validator("host")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host = value.removeprefix("[").removesuffix("]")
        if not _HOST.fullmatch(host):
            raise ValueError(f"{value!r} is not an address or a host name; give one such as 127.0.0.1 or ::1")
        return host


class GrpcSpec(Spec):
    """The gRPC front of the cluster (v2 protocol), shared by all pools. Plain text: gRPC through Serve has no TLS."""

    port: int = Field(default=9000, ge=1, le=65535)
    """Profile `fast`: on `http.host`. Profile `portable`: on the address that the node has in the cluster. With several
    pools, callers name theirs in the metadata `application`; a unary call without it reaches the only pool of its model."""


class ServeSpec(Spec):
    """Everything that is served from one store."""

    storage: StorageSpec = StorageSpec()
    cluster: str = Field(default="default", pattern=_NAME)
    """Name under which the store records what is served, for `maas-ray serve --restore` after a cluster was lost whole.
    Clusters that share a store need different ones."""
    profile: Literal["fast", "portable"] = "fast"
    """`fast`: HAProxy routes straight to replicas (Linux, no TLS). `portable`: Serve's Python proxy (everywhere, TLS)."""
    http: HttpSpec = HttpSpec()
    grpc: GrpcSpec | None = None
    """None: no gRPC."""
    pools: tuple[PoolSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.profile == "fast" and self.http.tls is not None:
            raise ValueError(
                "http.tls needs profile 'portable': behind HAProxy Serve's replicas never get healthy with TLS "
                "(ray-project/ray#64260); or leave http.tls out and end TLS at a load balancer before it"
            )
        if self.grpc is not None and self.http.tls is not None:
            raise ValueError("http.tls does not reach gRPC, which would stay plain text; leave out http.tls or grpc")
        if self.grpc is not None and self.grpc.port == self.http.port:
            raise ValueError(f"http and grpc have the same port {self.http.port}; each needs its own")
        for what in ("name", "route_prefix"):
            values = [getattr(pool, what) for pool in self.pools]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"two pools have the same {what}: {', '.join(twice)}; each needs its own")
        return self
