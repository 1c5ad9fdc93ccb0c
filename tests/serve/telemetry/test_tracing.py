"""Spans, created by the SDK of OpenTelemetry and kept by its in-memory exporter."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from maas_ray.errors import SpecError
from maas_ray.serve.telemetry.request_record import RequestRecord
from maas_ray.serve.telemetry.tracing import OTLP_PACKAGE, Tracer, TracingSpec, open_tracer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED = f"00-{TRACE}-{PARENT}-01".encode()
OK = RequestRecord("ok", 200, "id-1", 0.05, "default", "m", 3, "run-a", 100, 200, 4, 0.001, 0.002, 0.01)


def trace(*ended: RequestRecord, **spec: Any) -> list[ReadableSpan]:
    """The spans that requests make."""
    exporter = InMemorySpanExporter()
    tracer = Tracer(TracingSpec(enabled=True, **spec), exporter, "pool", "r1")
    for one in ended:
        tracer.note(one)
    tracer.close(30)
    return list(exporter.get_finished_spans())


@pytest.fixture(autouse=True)
def _gives_its_threads_back() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive(), thread.name


def test_a_request_has_its_queue_and_its_run_below_it() -> None:
    spans = {span.name: span for span in trace(OK, sample=1.0)}
    root, queue, compute = (spans[name] for name in ("infer", "queue", "compute"))
    assert root.parent is None
    assert root.kind is SpanKind.SERVER
    assert root.attributes == {
        "http.response.status_code": 200,
        "maas.request_id": "id-1",
        "maas.outcome": "ok",
        "maas.tenant": "default",
        "maas.model": "m",
        "maas.version": 3,
        "maas.run": "run-a",
        "maas.rows": 4,
    }
    assert root.resource.attributes["service.name"] == "maas-ray"
    assert root.resource.attributes["service.namespace"] == "pool"
    assert root.resource.attributes["service.instance.id"] == "r1"
    for part in (queue, compute):
        assert part.parent is not None
        assert part.parent.span_id == root.context.span_id
        assert part.context.trace_id == root.context.trace_id
        assert part.attributes == {"maas.model": "m", "maas.version": 3, "maas.run": "run-a", "maas.rows": 4}
    start = root.start_time or 0
    assert [((span.start_time or 0) - start, (span.end_time or 0) - start) for span in (root, queue, compute)] == [
        (0, 50_000_000),
        (1_000_000, 3_000_000),
        (3_000_000, 13_000_000),
    ]


def test_a_request_that_was_refused_has_no_run() -> None:
    refused = OK._replace(outcome="overloaded", status=503, queue_s=0.0, compute_s=0.0)
    (root,) = trace(refused, sample=1.0)
    assert root.status.status_code is StatusCode.ERROR
    assert root.status.description == "overloaded"
    (root,) = trace(refused._replace(outcome="bad_request", status=400), sample=1.0)
    assert root.status.status_code is StatusCode.UNSET


@pytest.mark.parametrize("sample", [0.0, 1.0])
@pytest.mark.parametrize("flags", ["01", "03", "ff"])
def test_a_traceparent_makes_the_request_a_part_of_its_callers_trace(flags: str, sample: float) -> None:
    spans = trace(OK._replace(traceparent=f"00-{TRACE}-{PARENT}-{flags}".encode()), sample=sample)
    (root,) = (span for span in spans if span.name == "infer")
    assert len(spans) == 3
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}
    assert root.parent is not None
    assert format(root.parent.span_id, "016x") == PARENT
    assert root.parent.is_remote


@pytest.mark.parametrize("flags", ["00", "02"])
def test_a_caller_that_does_not_sample_is_not_sampled(flags: str) -> None:
    assert trace(OK._replace(traceparent=f"00-{TRACE}-{PARENT}-{flags}".encode()), sample=1.0) == []


@pytest.mark.parametrize(
    "given",
    [
        b"",
        b"nonsense",
        f"ff-{TRACE}-{PARENT}-01".encode(),
        f"00-{'0' * 32}-{PARENT}-01".encode(),
        f"00-{TRACE}-{'0' * 16}-01".encode(),
        f"00-{TRACE.upper()}-{PARENT}-01".encode(),
        f"00-{TRACE}-{PARENT}-01-more".encode(),
        f"00-{TRACE}-{PARENT}".encode(),
        SAMPLED + b"\n",
        SAMPLED * 1000,
        b"\xff" * 55,
    ],
)
def test_a_traceparent_that_is_none_starts_a_trace_of_our_own(given: bytes) -> None:
    spans = trace(OK._replace(traceparent=given), sample=1.0)
    (root,) = (span for span in spans if span.name == "infer")
    assert root.parent is None
    assert format(root.context.trace_id, "032x") != TRACE
    assert trace(OK._replace(traceparent=given), sample=0.0) == []


def test_a_later_version_of_the_header_is_read_as_far_as_it_is_known() -> None:
    spans = trace(OK._replace(traceparent=f"01-{TRACE}-{PARENT}-01-more".encode()), sample=0.0)
    assert {format(span.context.trace_id, "032x") for span in spans} == {TRACE}


def test_a_share_is_traced() -> None:
    spans = trace(*[OK] * 500, sample=0.2, max_requests_per_s=1000)
    assert 40 <= sum(span.name == "infer" for span in spans) <= 180


def test_callers_cannot_have_more_traced_than_the_bound() -> None:
    spans = trace(*[OK._replace(traceparent=SAMPLED)] * 300, max_requests_per_s=10)
    # Twice, thrice and so on, should the clock's second change meanwhile.
    assert sum(span.name == "infer" for span in spans) in range(10, 101, 10)


class Hanging(InMemorySpanExporter):
    def __init__(self) -> None:
        super().__init__()
        self.freed = threading.Event()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self.freed.wait(30)
        return super().export(spans)


def test_a_collector_that_hangs_delays_no_request() -> None:
    exporter = Hanging()
    tracer = Tracer(TracingSpec(enabled=True, sample=1.0), exporter, "pool", "r1")
    tracer.note(OK)
    tracer.close(0.05)
    assert exporter.get_finished_spans() == ()
    exporter.freed.set()


def test_a_collector_that_fails_harms_no_request() -> None:
    num_tries = 0

    class Failing(InMemorySpanExporter):
        def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
            nonlocal num_tries
            num_tries += 1
            raise ConnectionError("no collector")

    tracer = Tracer(TracingSpec(enabled=True, sample=1.0), Failing(), "pool", "r1")
    tracer.note(OK)
    tracer.close(30)
    assert num_tries > 0


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(SpecError, match=f"pip install {OTLP_PACKAGE}"):
        open_tracer(TracingSpec(enabled=True), "pool", "r1")


def test_the_console_needs_no_further_package(capfd: pytest.CaptureFixture[str]) -> None:
    tracer = open_tracer(TracingSpec(enabled=True, exporter="console", sample=1.0), "pool", "r1")
    assert tracer is not None
    tracer.note(OK)
    tracer.close(30)
    assert capfd.readouterr().err.count('"maas.run": "run-a"') == 3


def test_nothing_of_opentelemetry_is_imported_while_tracing_is_off() -> None:
    script = (
        "import sys; from maas_ray.serve.telemetry.tracing import *\n"
        "assert open_tracer(TracingSpec(), 'pool', 'r1') is None\n"
        "sys.exit(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0
