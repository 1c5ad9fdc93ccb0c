"""Prometheus text of the statistics of a pool's replicas, from snapshots of `serve.telemetry.stats`.

One scrape through any replica returns the whole pool: every series has the label of the replica that counted it, so a
counter stays monotonic whichever replica answers. A histogram appears with its first observation; counters and gauges
exist from the start. Label values are names from the registry, numbers, and constants of our own code; no part of a
request becomes a label.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from maas_ray.serve.telemetry.stats import BOUNDS_S

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS_CONTENT_TYPE = b"application/openmetrics-text; version=1.0.0; charset=utf-8"


class MetricFamily(NamedTuple):
    """One metric: its name as Prometheus stores it, its type and its help text."""

    name: str
    kind: Literal["counter", "gauge", "histogram", "summary"]
    help: str


FAMILIES = (
    MetricFamily("maas_requests_total", "counter", "Completed inference requests, by outcome."),
    MetricFamily("maas_inference_count_total", "counter", "Rows of successful requests."),
    MetricFamily("maas_execution_count_total", "counter", "Successful runs of the engine."),
    MetricFamily("maas_execution_seconds_total", "counter", "Time of these runs; its rate is engine utilization."),
    MetricFamily("maas_batch_rows", "histogram", "Rows of one run; sum divided by count is the mean batch size."),
    MetricFamily("maas_merge_checks_total", "counter", "Merged requests that were run again alone."),
    MetricFamily("maas_merge_differences_total", "counter", "Merged requests whose outputs differed; the first one ends merging."),
    MetricFamily("maas_request_seconds", "histogram", "End-to-end time of successful requests."),
    MetricFamily("maas_queue_seconds", "histogram", "Time of a request in the queue, until its first run."),
    MetricFamily("maas_compute_seconds", "histogram", "Time of the whole run that a request was part of, per request."),
    MetricFamily("maas_read_seconds", "summary", "Time to parse a request."),
    MetricFamily("maas_write_seconds", "summary", "Time to write a response."),
    MetricFamily("maas_pending_requests", "gauge", "Requests in the queue."),
    MetricFamily("maas_model_loaded", "gauge", "1 if the version is in the replica's memory."),
    MetricFamily("maas_model_loads_total", "counter", "Successful loads."),
    MetricFamily("maas_model_load_failures_total", "counter", "Failed loads."),
    MetricFamily("maas_model_evictions_total", "counter", "Times the version was removed from the replica's memory."),
    MetricFamily("maas_model_load_seconds", "summary", "Time of a load, from the first byte read to the end of the warm-up."),
    MetricFamily("maas_http_responses_total", "counter", "Responses without a model version, by route and status."),
    MetricFamily("maas_connections", "gauge", "Open connections."),
    MetricFamily("maas_connections_accepted_total", "counter", "Connections accepted."),
    MetricFamily("maas_access_log_dropped_total", "counter", "Lines of the access log dropped because its buffer was full."),
    MetricFamily("maas_replicas_silent", "gauge", "Replicas that did not answer this scrape in time; their counts are missing."),
    MetricFamily("maas_replica_start_time_seconds", "gauge", "Start time of the replica, in seconds since the epoch; the count is the number of replicas."),
)  # fmt: skip
"""All metrics, in the order of the text."""

_TIME_BUCKETS = [f',le="{bound!r}"}} ' for bound in BOUNDS_S] + [',le="+Inf"} ']
_ROW_BOUNDS = [1 << power for power in range(11)]
_ROW_BUCKETS = [f',le="{bound}.0"}} ' for bound in _ROW_BOUNDS] + [',le="+Inf"} ']


def exposition(
    replicas: Iterable[Mapping[str, Any]], *, pool: str = "", num_silent: int = 0, openmetrics: bool = False
) -> bytes:
    """Returns the text of a scrape.

    Args:
        replicas: snapshots of `ReplicaStats`, one of each replica that answered.
        pool: name of the pool.
        num_silent: number of replicas of the pool that did not answer.
        openmetrics: OpenMetrics 1.0 instead of Prometheus' text format 0.0.4; see the two content types.
    """
    lines: defaultdict[str, list[str]] = defaultdict(list)
    for replica in replicas:
        _add_replica(lines, replica)
    if pool:
        lines["maas_replicas_silent"].append(f'maas_replicas_silent{{pool="{_escape(pool)}"}} {num_silent}')
    text: list[str] = []
    for family in FAMILIES:
        is_counter = openmetrics and family.kind == "counter"
        name = family.name.removesuffix("_total") if is_counter else family.name
        text += (f"# HELP {name} {family.help}", f"# TYPE {name} {family.kind}")
        text += lines[family.name]
    text.append("# EOF\n" if openmetrics else "")
    return "\n".join(text).encode()


def _add_replica(lines: Mapping[str, list[str]], replica: Mapping[str, Any]) -> None:
    pool, number = _escape(replica["pool"]), _escape(replica["replica"])
    for model in replica["models"]:
        labels = f'{{pool="{pool}",model="{_escape(model["model"])}",version="{model["version"]}",replica="{number}"'
        _add_model(lines, model, labels)
    labels = f'{{pool="{pool}",replica="{number}"'
    for route, status, count in replica["routes"]:
        lines["maas_http_responses_total"].append(
            f'maas_http_responses_total{labels},route="{_escape(route)}",status="{status}"}} {count}'
        )
    for name, value in (
        ("maas_connections", replica["connections"]),
        ("maas_connections_accepted_total", replica["connections_total"]),
        ("maas_access_log_dropped_total", replica["log_drops"]),
        ("maas_replica_start_time_seconds", replica["start_ms"] / 1e3),
    ):
        lines[name].append(f"{name}{labels}}} {value}")


def _add_model(lines: Mapping[str, list[str]], model: Mapping[str, Any], labels: str) -> None:
    lines["maas_requests_total"] += [
        f'maas_requests_total{labels},outcome="{outcome}"}} {count}' for outcome, count in model["outcomes"].items()
    ]
    batches = model["batches"]
    num_runs = sum(batch[1] for batch in batches)
    for name, value in (
        ("maas_inference_count_total", model["rows"]),
        ("maas_execution_count_total", num_runs),
        ("maas_execution_seconds_total", sum(batch[2] for batch in batches) / 1e9),
        ("maas_merge_checks_total", model["merge_checks"]),
        ("maas_merge_differences_total", model["merge_differences"]),
        ("maas_pending_requests", model["pending"]),
        ("maas_model_loaded", model["loaded"]),
        ("maas_model_loads_total", model["loads"]),
        ("maas_model_load_failures_total", model["load_failures"]),
        ("maas_model_evictions_total", model["evictions"]),
    ):
        lines[name].append(f"{name}{labels}}} {value}")
    for name, count, total_ns in (
        ("maas_read_seconds", model["converted"], model["read_ns"]),
        ("maas_write_seconds", model["converted"], model["write_ns"]),
        ("maas_model_load_seconds", model["loads"], model["load_ns"]),
    ):
        lines[name] += (f"{name}_sum{labels}}} {total_ns / 1e9}", f"{name}_count{labels}}} {count}")
    for name, key in (
        ("maas_request_seconds", "request"),
        ("maas_queue_seconds", "queue"),
        ("maas_compute_seconds", "compute"),
    ):
        _add_histogram(lines[name], name, labels, _TIME_BUCKETS, model[key]["counts"], model[key]["ns"] / 1e9)
    counts = [0] * len(_ROW_BUCKETS)
    for size, runs, _ in batches:
        counts[min((size - 1).bit_length(), len(_ROW_BOUNDS))] += runs
    _add_histogram(lines["maas_batch_rows"], "maas_batch_rows", labels, _ROW_BUCKETS, counts, model["rows_run"])


def _add_histogram(
    lines: list[str], name: str, labels: str, buckets: Sequence[str], counts: Sequence[int], total: float
) -> None:
    cumulative = list(accumulate(counts))
    if not cumulative[-1]:
        return  # four fifths of all series are buckets, and only a few of a pool's many models get requests
    start = f"{name}_bucket{labels}"
    lines += [f"{start}{bucket}{count}" for bucket, count in zip(buckets, cumulative, strict=True)]
    lines += (f"{name}_sum{labels}}} {total}", f"{name}_count{labels}}} {cumulative[-1]}")


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
