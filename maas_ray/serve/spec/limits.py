"""The limits of one request and of one connection."""

from typing import Self

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from maas_ray.cluster.node.environment import MAX_ANSWER_S
from maas_ray.serve.spec.cors import check_origin
from maas_ray.serve.wire.answer_size import MAX_ANSWER_BYTES
from maas_ray.spec import Spec


class LimitsSpec(Spec):
    """Limits of one request and of one connection."""

    max_body_bytes: PositiveInt = 16 << 20
    """Maximum bytes of a request body; a larger one gets status 413 without being parsed."""
    max_answer_bytes: PositiveInt = MAX_ANSWER_BYTES
    """Maximum bytes of the tensors in a response; a larger response is refused with status 422 before it is written.
    The size can depend on values of the request and be much larger than the request."""
    timeout_s: PositiveFloat = Field(default=30.0, le=MAX_ANSWER_S)
    """Maximum time until the response; `x-request-timeout-ms` may shorten it, never extend it."""
    drain_timeout_s: PositiveFloat | None = None
    """Time for which a stopping replica answers waiting requests; None: same as `timeout_s`. A shorter time would abort
    requests that may still run."""
    io_timeout_s: PositiveFloat = 8.0
    """Time within which a request head must be complete, and over which the speed of reads and writes is measured."""
    min_bytes_per_s: PositiveInt = 16 << 10
    """Minimum speed of a request body, and of a client that reads a response; slower connections are closed."""
    idle_timeout_s: PositiveFloat = 120.0
    """Time after which a connection without a request is closed; must exceed the keep-alive time of the front."""
    cors_origins: tuple[str, ...] = ()
    """Origins (`https://shop.example`) whose pages may call this pool from a browser, or `*` for all; empty: none."""
    max_connections: PositiveInt = 10_000
    """Maximum connections of one replica, fewer if its limit of open files is lower; more get status 503 and are
    closed."""

    @property
    def drain_s(self) -> float:
        """`drain_timeout_s`, or its derived value."""
        return self.timeout_s if self.drain_timeout_s is None else self.drain_timeout_s

    @model_validator(mode="after")
    def _drain_outlasts_a_request(self) -> Self:
        if self.drain_s < self.timeout_s:
            raise ValueError(
                f"drain_timeout_s {self.drain_s:g} is below timeout_s {self.timeout_s:g}: a stopping replica would "
                "abort requests that may still run; omit drain_timeout_s, raise it, or lower timeout_s"
            )
        return self

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(check_origin(origin) for origin in value)
