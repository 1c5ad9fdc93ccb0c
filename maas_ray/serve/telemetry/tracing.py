"""OpenTelemetry spans of inference requests. Disabled by default; OpenTelemetry is then not imported.

A request's spans (`infer`, with the children `queue` and `compute`) are created when it has ended, from times that are
measured anyway, so that a request which is not sampled costs one comparison. A valid W3C `traceparent` makes the
request part of its client's trace, and the client's sampling flag decides; a limit per second applies to all.
"""

import re
import sys
import threading
import time
from random import random
from typing import TYPE_CHECKING, Literal

from pydantic import Field, PositiveInt, field_validator

from maas_ray.display import get_logger
from maas_ray.errors import SpecError
from maas_ray.serve.telemetry.request_record import RequestRecord
from maas_ray.spec import Spec

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace.export import SpanExporter

log = get_logger(__name__)

OTLP_PACKAGE = "opentelemetry-exporter-otlp-proto-http"
# Version 00 has exactly these fields; a later version may append more (W3C Trace Context, section 3.2).
_TRACEPARENT = re.compile(rb"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?")
_SPANS_PER_REQUEST = 3


class TracingSpec(Spec):
    """Tracing of inference requests with OpenTelemetry."""

    enabled: bool = False
    """Whether requests are traced."""
    exporter: Literal["otlp", "console"] = "otlp"
    """`otlp`: to a collector over HTTP, which needs the package opentelemetry-exporter-otlp-proto-http. `console`: as
    JSON on stderr."""
    endpoint: str = "http://127.0.0.1:4318/v1/traces"
    """URL of the collector (`otlp` only)."""
    sample: float = Field(default=0.01, ge=0, le=1)
    """Share of the requests without `traceparent` that are traced; with it, the client's flag decides."""
    max_requests_per_s: PositiveInt = 200
    """Maximum traced requests of one replica per second, including those with `traceparent`; each costs about 0.1
    ms."""

    @field_validator("endpoint")
    @classmethod
    def _is_url(cls, value: str) -> str:
        if not value.startswith(("http://", "https://")):
            raise ValueError("the endpoint must be a URL, such as http://127.0.0.1:4318/v1/traces")
        return value


def open_tracer(spec: TracingSpec, pool: str, replica: str) -> "Tracer | None":
    """Returns the tracer of one replica; None if tracing is disabled.

    Raises:
        SpecError: the exporter's package is not installed.
    """
    return Tracer(spec, _exporter(spec), pool, replica) if spec.enabled else None


class Tracer:
    """Converts completed requests to spans, which a thread of the SDK sends in batches.

    Args:
        spec: sampling options.
        exporter: exporter of the SDK; closed together with the tracer.
        pool: name of the pool.
        replica: id of this replica.
    """

    def __init__(self, spec: TracingSpec, exporter: "SpanExporter", pool: str, replica: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON

        self._sample = spec.sample
        self._limit = spec.max_requests_per_s
        self._second = 0
        self._num_in_second = 0
        resource = {"service.name": "maas-ray", "service.namespace": pool, "service.instance.id": replica}
        # Sampling happens before; the SDK's atexit hook would wait for up to 30 s.
        self._provider = TracerProvider(ALWAYS_ON, Resource.create(resource), shutdown_on_exit=False)
        # Explicit numbers: the SDK would otherwise read them from environment variables.
        self._provider.add_span_processor(
            BatchSpanProcessor(
                exporter,
                max_queue_size=max(2048, 2 * _SPANS_PER_REQUEST * self._limit),
                schedule_delay_millis=1000,
                max_export_batch_size=512,
            )
        )
        self._tracer = self._provider.get_tracer("maas_ray")

    def note(self, record: RequestRecord) -> None:
        """Creates the spans of a request, if it is sampled."""
        parent = _TRACEPARENT.fullmatch(record.traceparent) if record.traceparent else None
        if parent is not None and parent[1] == b"00" and parent[5] is not None:
            parent = None
        if parent is None:
            if random() >= self._sample:  # noqa: S311
                return
        elif not int(parent[4], 16) & 1:
            return
        now_ns = time.time_ns()
        if now_ns // 1_000_000_000 != self._second:
            self._second, self._num_in_second = now_ns // 1_000_000_000, 0
        self._num_in_second += 1
        if self._num_in_second > self._limit:
            return
        try:
            self._make_spans(record, None if parent is None else _context(parent[2], parent[3]), now_ns)
        except Exception:  # tracing must not fail a request that was answered
            log.exception("the spans of a request could not be created")

    def close(self, timeout_s: float) -> None:
        """Sends buffered spans, for at most `timeout_s`."""
        # The SDK waits 30 s for an exporter that hangs, so its shutdown runs in a thread with a time limit.
        closing = threading.Thread(target=self._provider.shutdown, name="tracing-close", daemon=True)
        closing.start()
        closing.join(timeout_s)
        if closing.is_alive():
            log.warning("sending the last spans took longer than %g s; they are lost", timeout_s)

    def _make_spans(self, record: RequestRecord, parent: "Context | None", end_ns: int) -> None:
        from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

        start_ns = end_ns - round(record.total_s * 1e9)
        attributes: dict[str, str | int] = {
            "http.response.status_code": record.status,
            "maas.request_id": record.request_id,
            "maas.outcome": record.outcome,
            "maas.tenant": record.tenant,
            "maas.model": record.model,
            "maas.version": record.version,
            "maas.run": record.run,
            "maas.rows": record.num_rows,
        }
        root = self._tracer.start_span("infer", parent, SpanKind.SERVER, attributes, start_time=start_ns)
        if record.status >= 500:
            root.set_status(Status(StatusCode.ERROR, record.outcome))
        below = set_span_in_context(root)
        part_ns = start_ns + round(record.read_s * 1e9)
        for name, part_s in (("queue", record.queue_s), ("compute", record.compute_s)):
            if part_s > 0:
                shared = {key: attributes[key] for key in ("maas.model", "maas.version", "maas.run", "maas.rows")}
                span = self._tracer.start_span(name, below, SpanKind.INTERNAL, shared, start_time=part_ns)
                part_ns += round(part_s * 1e9)
                span.end(part_ns)
        root.end(end_ns)


def _context(trace_id: bytes, span_id: bytes) -> "Context":
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context

    context = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(1))
    return set_span_in_context(NonRecordingSpan(context))


def _exporter(spec: TracingSpec) -> "SpanExporter":
    if spec.exporter == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        return ConsoleSpanExporter(out=sys.stderr, formatter=lambda span: span.to_json(indent=None) + "\n")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise SpecError(
            f"observability.tracing with exporter 'otlp' needs a package that is not installed ({error}); run "
            f"pip install {OTLP_PACKAGE} on every node, or use exporter 'console'"
        ) from None
    exporter: SpanExporter = OTLPSpanExporter(endpoint=spec.endpoint, timeout=5)
    return exporter
