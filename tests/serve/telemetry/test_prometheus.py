"""Metrics text, read by the parsers of Prometheus' own client; the dashboard uses only metrics in it."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
from prometheus_client import Metric
from prometheus_client import parser as prometheus
from prometheus_client.openmetrics import parser as openmetrics_parser

from maas_ray.serve.telemetry.prometheus import FAMILIES, exposition
from maas_ray.serve.telemetry.stats import OUTCOMES, ReplicaStats
from tests.support.rig import Waits
from tests.support.root import ROOT

DASHBOARD = ROOT / "deployments" / "grafana.json"


def some_replica(name: str = "r1", pool: str = "p", model: str = "m") -> ReplicaStats:
    """Has seen six requests, four of which ended well, in two runs."""
    replica = ReplicaStats(pool, name)
    stats = replica.loaded(model, 3, 1.5, pending=lambda: 5)
    for _ in range(6):
        stats.waited([Waits()], 0.003)
    stats.ran(5, 10, 0.02)
    stats.ran(1, 2, 0.01)
    for _ in range(4):
        stats.served(0.0001, 0.0002, 0.03, 2, 1.7e9)
    for outcome in ("failed", "cancelled"):
        stats.finished(outcome, 0.03, 2, 1.7e9)
    replica.connections, replica.connections_total = 2, 9
    replica.log_drops = lambda: 4
    replica.answered("ready", 200)
    replica.answered("ready", 200)
    replica.answered("infer", 404)
    return replica


def parse(text: bytes) -> list[Metric]:
    return list(prometheus.text_string_to_metric_families(text.decode()))


def samples(text: bytes) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = {}
    for family in parse(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is there twice"
            found[key] = sample.value
    return found


def test_the_text_contains_the_counts() -> None:
    text = exposition([some_replica().snapshot()])
    labels = {"pool": "p", "model": "m", "version": "3", "replica": "r1"}
    found = samples(text)

    def value(name: str, **more: str) -> float:
        return found[name, frozenset({**labels, **more}.items())]

    def of_replica(name: str, **more: str) -> float:
        return found[name, frozenset({"pool": "p", "replica": "r1", **more}.items())]

    assert [value("maas_requests_total", outcome=outcome) for outcome in OUTCOMES] == [4, 0, 0, 0, 1, 1]
    assert value("maas_inference_count_total") == 8
    assert value("maas_execution_count_total") == 2
    assert value("maas_execution_seconds_total") == pytest.approx(0.03)
    assert value("maas_request_seconds_count") == 4
    assert value("maas_request_seconds_sum") == pytest.approx(0.12)
    assert value("maas_request_seconds_bucket", le="0.025") == 0
    assert value("maas_request_seconds_bucket", le="0.05") == 4
    assert value("maas_queue_seconds_sum") == pytest.approx(0.018)
    assert value("maas_compute_seconds_count") == 6
    assert value("maas_compute_seconds_sum") == pytest.approx(0.11)
    assert [value("maas_batch_rows_bucket", le=le) for le in ("1.0", "2.0", "8.0", "16.0", "+Inf")] == [0, 1, 1, 2, 2]
    assert value("maas_batch_rows_sum") == 12
    assert value("maas_write_seconds_sum") == pytest.approx(0.0008)
    assert value("maas_pending_requests") == 5
    assert value("maas_model_loaded") == value("maas_model_loads_total") == value("maas_model_load_seconds_count") == 1
    assert value("maas_model_load_seconds_sum") == 1.5
    assert value("maas_model_evictions_total") == value("maas_model_load_failures_total") == 0
    assert of_replica("maas_connections") == 2
    assert of_replica("maas_connections_accepted_total") == 9
    assert of_replica("maas_access_log_dropped_total") == 4
    assert of_replica("maas_http_responses_total", route="ready", status="200") == 2
    assert of_replica("maas_http_responses_total", route="infer", status="404") == 1


def check_histograms(families: list[Metric]) -> None:
    """Fails unless every histogram is one: cumulative, closed by +Inf, which equals its count."""
    for family in families:
        if family.type != "histogram":
            continue
        series: dict[Any, dict[str, Any]] = {}
        for sample in family.samples:
            labels = dict(sample.labels)
            bound = labels.pop("le", None)
            of = series.setdefault(frozenset(labels.items()), {"buckets": []})
            if bound is None:
                of[sample.name.removeprefix(family.name)] = sample.value
            else:
                of["buckets"].append((float(bound), sample.value))
        for of in series.values():
            assert of["buckets"] == sorted(of["buckets"])
            assert [count for _, count in of["buckets"]] == sorted(count for _, count in of["buckets"])
            assert of["buckets"][-1] == (math.inf, of["_count"])
            assert "_sum" in of


@pytest.mark.parametrize("num_replicas", [0, 1, 3])
def test_every_metric_is_described_and_grouped_for_both_formats(num_replicas: int) -> None:
    replicas = [some_replica(f"r{number}").snapshot() for number in range(num_replicas)]
    text = exposition(replicas)
    families = parse(text)
    described = {(family.name, family.type): family.documentation for family in families}
    assert described == {(family.name.removesuffix("_total"), family.kind): family.help for family in FAMILIES}
    assert len(families) == len(FAMILIES), "the samples of a metric are apart"
    check_histograms(families)
    strict = list(openmetrics_parser.text_string_to_metric_families(exposition(replicas, openmetrics=True).decode()))
    assert {(family.name, family.type): family.documentation for family in strict} == described
    as_text = [(sample.name, sample.labels, sample.value) for family in families for sample in family.samples]
    assert as_text == [(sample.name, sample.labels, sample.value) for family in strict for sample in family.samples]


def test_a_histogram_that_is_none_is_caught() -> None:
    text = exposition([some_replica().snapshot()]).decode()
    wrong = re.sub(r'(maas_request_seconds_bucket.*le="\+Inf"}) 4', r"\1 5", text)
    assert wrong != text
    with pytest.raises(AssertionError):
        check_histograms(parse(wrong.encode()))


def test_each_replica_has_its_own_series() -> None:
    replicas = [some_replica(name).snapshot() for name in ("a", "b")]
    both = samples(exposition(replicas))
    for replica in replicas:
        alone = samples(exposition([replica]))
        assert alone.items() <= both.items()
    assert len(both) == 2 * len(alone)
    assert samples(exposition(replicas[::-1])) == both, "it matters who answers"


def test_a_histogram_begins_with_the_first_thing_it_counts_and_counters_with_the_model() -> None:
    replica = ReplicaStats("p", "r1")
    stats = replica.loaded("m", 3, 1.5)
    before = samples(exposition([replica.snapshot()]))
    names = {name for name, _ in before}
    assert not any(name.endswith("_bucket") for name in names)
    assert {family.name for family in FAMILIES if family.kind == "counter"} - names == {"maas_http_responses_total"}
    assert [value for (name, _), value in before.items() if name == "maas_requests_total"] == [0] * len(OUTCOMES)
    stats.waited([Waits()], 0.003)
    stats.ran(1, 2, 0.01)
    stats.served(0.0001, 0.0002, 0.03, 2, 1.7e9)
    after = samples(exposition([replica.snapshot()]))
    assert before.keys() < after.keys()
    described = {family.name for family in FAMILIES if family.kind == "histogram"}
    assert {
        name.removesuffix("_count") for name, _ in after.keys() - before.keys() if name.endswith("_count")
    } == described
    check_histograms(parse(exposition([replica.snapshot()])))


def test_label_values_are_escaped() -> None:
    odd = 'a"b\\c\nd{}=,# ä'
    replica = some_replica(name=odd, pool=odd, model=odd)
    for text, parser in (
        (exposition([replica.snapshot()]), prometheus),
        (exposition([replica.snapshot()], openmetrics=True), openmetrics_parser),
    ):
        for family in parser.text_string_to_metric_families(text.decode()):
            for sample in family.samples:
                assert sample.labels["pool"] == sample.labels["replica"] == odd
                assert sample.labels.get("model", odd) == odd


def test_the_number_of_series_does_not_grow_with_the_requests() -> None:
    replica = some_replica()
    before = len(samples(exposition([replica.snapshot()])))
    stats = replica.model("m", 3)
    for number in range(3000):
        stats.waited([Waits()], number / 7)
        stats.ran(1, number + 1, number / 7)
        stats.served(0.0, 0.0, number / 7, number, 1.7e9 + number)
    assert len(samples(exposition([replica.snapshot()]))) == before


def expressions(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in ("expr", "definition") and isinstance(inner, str):
                yield inner
            else:
                yield from expressions(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from expressions(inner)


def test_the_dashboard_shows_only_metrics_and_labels_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    found = samples(exposition([some_replica().snapshot()]))
    names = {name for name, _ in found}
    labels = {label for _, pairs in found for label, _ in pairs}
    asked = list(expressions(dashboard))
    assert len(asked) > 30
    for expression in asked:
        used = set(re.findall(r"\bmaas_[a-z_]+", expression))
        assert used, expression
        assert used <= names, expression
        assert set(re.findall(r"(\w+)=~?\"", expression)) <= labels, expression
        for grouped in re.findall(r"by \(([^)]*)\)", expression):
            assert {label.strip() for label in grouped.split(",")} <= labels, expression
    assert {variable["name"] for variable in dashboard["templating"]["list"]} == {"datasource", "pool", "model"}
    described = {re.sub(r"_(sum|count|bucket)$", "", name) for name in names}
    shown = {
        re.sub(r"_(sum|count|bucket)$", "", name) for text in asked for name in re.findall(r"\bmaas_[a-z_]+", text)
    }
    assert shown == described, "a metric is on no panel"


def test_the_panels_of_the_dashboard_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not own & cells, panel["title"]
        cells |= own
        assert panel["type"] == "row" or panel["targets"], panel["title"]
