"""The spec of everything that is served from one store: the store, the HTTP and gRPC fronts, and the pools."""

import re
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from maas_ray.serve.spec.pools import NAME, PoolSpec
from maas_ray.spec import Spec
from maas_ray.store.objects import StorageSpec

_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]*|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*")


class TlsSpec(Spec):
    """TLS of Serve's own proxy."""

    certificate: str
    """Path of the PEM certificate chain, the same on every node."""
    key: str
    """Path of the PEM private key."""


class HttpSpec(Spec):
    """The HTTP front of the cluster, shared by all pools."""

    host: str = "127.0.0.1"
    """Address to listen on; the default is reachable only from this machine."""
    port: int = Field(default=8000, ge=1, le=65535)
    tls: TlsSpec | None = None

    @field_validator("host")
    @classmethod
    def _is_address(cls, value: str) -> str:
        host = value.removeprefix("[").removesuffix("]")
        if not _HOST.fullmatch(host):
            raise ValueError(f"{value!r} is not an address or a host name; use one such as 127.0.0.1 or ::1")
        return host


class GrpcSpec(Spec):
    """The gRPC front of the cluster (v2 protocol), shared by all pools. Plain text: gRPC through Serve has no TLS."""

    port: int = Field(default=9000, ge=1, le=65535)
    """Port. Profile `fast`: at `http.host`. Profile `portable`: at the address of the node in the cluster. With several
    pools, clients send the pool's name as the metadata `application`; without it, a unary call is sent to the only pool
    that serves its model."""


class ServeSpec(Spec):
    """Everything that is served from one store."""

    storage: StorageSpec = Field(default_factory=StorageSpec)
    cluster: str = Field(default="default", pattern=NAME)
    """Name under which the store records the served pools, for `maas-ray serve --restore` after the loss of a whole
    cluster. Clusters that share a store need different names."""
    profile: Literal["fast", "portable"] = "fast"
    """`fast`: HAProxy in front of the replicas (Linux, no TLS). `portable`: Serve's Python proxy (all systems, TLS)."""
    http: HttpSpec = HttpSpec()
    grpc: GrpcSpec | None = None
    """None: no gRPC."""
    pools: tuple[PoolSpec, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.profile == "fast" and self.http.tls is not None:
            raise ValueError(
                "http.tls needs profile 'portable': behind HAProxy Serve's replicas never become healthy with TLS "
                "(ray-project/ray#64260); or omit http.tls and terminate TLS at a load balancer"
            )
        if self.grpc is not None and self.http.tls is not None:
            raise ValueError("http.tls does not apply to gRPC, which would stay plain text; omit http.tls or grpc")
        if self.grpc is not None and self.grpc.port == self.http.port:
            raise ValueError(f"http and grpc have the same port {self.http.port}; each needs its own")
        for what in ("name", "route_prefix"):
            values = [getattr(pool, what) for pool in self.pools]
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(f"two pools have the same {what}: {', '.join(twice)}; each needs its own")
        return self
