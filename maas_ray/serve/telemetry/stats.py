"""Statistics of one replica: counts and times per model version. Independent of Ray, HTTP and exposition formats.

All calls are made on the loop, so nothing is locked. A call costs a few hundred nanoseconds: a bisection and a few
additions; formats are produced from snapshots, on request. Times are seconds of a clock with a resolution of
microseconds (`time.perf_counter`; uvloop's own clock has a resolution of milliseconds).
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, get_args

from maas_ray.errors import DeadlineExceeded, MaasError, Overloaded

Outcome = Literal["ok", "bad_request", "overloaded", "expired", "cancelled", "failed"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)
"""Outcomes of a request. `cancelled`: the client disconnected; `failed`: a server error."""

BOUNDS_S = (25e-6, 5e-5, 1e-4, 25e-5, 5e-4, 1e-3, 25e-4, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # fmt: skip
"""Upper bounds of the histograms' buckets, inclusive; one more bucket is unbounded."""

MAX_EXACT_ROWS = 256
"""Runs with more rows are counted under the next power of two: clients choose these sizes, so there must be few."""

MAX_KEPT = 1000
"""Maximum number of unloaded versions with counts; above it those of the longest idle version are dropped."""


def outcome_of(error: MaasError | None) -> Outcome:
    """Returns the outcome of a response or an error."""
    if error is None:
        return "ok"
    if isinstance(error, Overloaded):
        return "overloaded"
    if isinstance(error, DeadlineExceeded):
        return "expired"
    return "bad_request" if error.http_status < 500 else "failed"


class Waited(Protocol):
    """Item that has waited."""

    arrived_s: float
    queue_s: float


class ModelStats:
    """Statistics of one model version in one replica.

    Args:
        name: name of the model.
        version: number of the version.
    """

    __slots__ = ("_batches", "_checks", "_compute", "_compute_s", "_differences", "_e2e", "_fail_s", "_last_s", "_num_ok", "_num_rows", "_num_rows_run", "_ok_s", "_outcomes", "_queue", "_queue_s", "_read_s", "_write_s", "evictions", "is_loaded", "load_failures", "load_s", "loads", "mixes", "name", "pending", "version")  # fmt: skip

    def __init__(self, name: str, version: int) -> None:
        self.name = name
        self.version = version
        self._outcomes: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
        # Sums are floats: cheaper than integer ns, and exact to 1 ns for 100 days of summed time.
        self._queue, self._queue_s = _buckets(), 0.0
        self._compute, self._compute_s = _buckets(), 0.0
        self._e2e, self._ok_s = _buckets(), 0.0
        self._fail_s = 0.0
        self._num_ok, self._read_s, self._write_s = 0, 0.0, 0.0
        self._num_rows = self._num_rows_run = 0
        self._batches: dict[int, list[float]] = {}
        self._last_s = 0.0
        self._checks = self._differences = 0
        self.mixes = ""
        """Why requests must not share runs, if a check of merged ones found a difference; kept after an unload."""
        self.pending: Callable[[], int] | None = None
        """Returns the number of waiting requests; None: not in memory, so there are none."""
        self.is_loaded = False
        self.loads = self.load_failures = self.evictions = 0
        self.load_s = 0.0

    def waited(self, items: Sequence[Waited], now_s: float) -> None:
        """Records that requests left the queue for their first run; sets the waiting time of each.

        Args:
            items: the requests.
            now_s: current time on the clock of their `arrived_s`.
        """
        counts, sum_s = self._queue, 0.0
        for item in items:
            item.queue_s = queue_s = now_s - item.arrived_s
            counts[bisect_left(BOUNDS_S, queue_s)] += 1
            sum_s += queue_s
        self._queue_s += sum_s

    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        """Records a successful run of the engine. Each of its requests has spent `run_s` in it."""
        self._compute[bisect_left(BOUNDS_S, run_s)] += num_requests
        self._compute_s += run_s * num_requests
        self._num_rows_run += num_rows
        size = num_rows if num_rows <= MAX_EXACT_ROWS else 1 << (num_rows - 1).bit_length()
        batch = self._batches.get(size)
        if batch is None:
            self._batches[size] = [1, run_s]
        else:
            batch[0] += 1
            batch[1] += run_s

    def checked(self, difference: str) -> None:
        """Records that a merged request was run again alone; `difference` is the reason if merging has ended."""
        self._checks += 1
        if difference:
            self._differences += 1
            self.mixes = difference

    def served(self, read_s: float, write_s: float, total_s: float, num_rows: int, now_s: float) -> None:
        """Records a successful request: parsed in `read_s`, its response written in `write_s`; then as `finished`."""
        self._num_ok += 1
        self._read_s += read_s
        self._write_s += write_s
        self._last_s = now_s
        self._e2e[bisect_left(BOUNDS_S, total_s)] += 1
        self._ok_s += total_s
        self._num_rows += num_rows

    def finished(self, outcome: Outcome, total_s: float, num_rows: int, now_s: float) -> None:
        """Records the end of a request, `total_s` after its first byte; called once for each that was not `served`.

        Args:
            outcome: one of `OUTCOMES`.
            total_s: end-to-end time.
            num_rows: number of its rows, 0 if unknown.
            now_s: current time in seconds since the epoch.
        """
        self._outcomes[outcome] += 1
        self._last_s = now_s
        self._fail_s += total_s

    def snapshot(self) -> dict[str, Any]:
        """Returns all counts as plain JSON values; see `merge`.

        Keys: model, version, outcomes (by name), rows (of successful requests), rows_run (of successful runs), queue,
        compute and request (histograms: `counts` by bucket of `BOUNDS_S` and the sum in `ns`; compute counts requests,
        each with the whole time of its run; request counts successful ones), fail_ns, converted, read_ns, write_ns,
        batches (rows, runs, ns; ascending), merge_checks, merge_differences, last_ms (since the epoch), pending,
        loaded, loads, load_failures, evictions, load_ns.
        """
        return {
            "model": self.name,
            "version": self.version,
            "outcomes": {**self._outcomes, "ok": self._num_ok},
            "rows": self._num_rows,
            "rows_run": self._num_rows_run,
            "queue": {"counts": list(self._queue), "ns": _ns(self._queue_s)},
            "compute": {"counts": list(self._compute), "ns": _ns(self._compute_s)},
            "request": {"counts": list(self._e2e), "ns": _ns(self._ok_s)},
            "fail_ns": _ns(self._fail_s),
            "converted": self._num_ok,
            "read_ns": _ns(self._read_s),
            "write_ns": _ns(self._write_s),
            "batches": [[size, int(runs), _ns(run_s)] for size, (runs, run_s) in sorted(self._batches.items())],
            "merge_checks": self._checks,
            "merge_differences": self._differences,
            "last_ms": int(self._last_s * 1e3),
            "pending": 0 if self.pending is None else self.pending(),
            "loaded": int(self.is_loaded),
            "loads": self.loads,
            "load_failures": self.load_failures,
            "evictions": self.evictions,
            "load_ns": _ns(self.load_s),
        }


class ReplicaStats:
    """All statistics of one replica.

    Args:
        pool: name of the pool.
        replica: id of this replica, unique in the pool.
    """

    def __init__(self, pool: str = "default", replica: str = "0") -> None:
        self.pool = pool
        self.replica = replica
        self.models: dict[tuple[str, int], ModelStats] = {}
        self.connections = 0
        """Connections that are open now."""
        self.connections_total = 0
        """Total connections accepted."""
        self.log_drops: Callable[[], int] | None = None
        """Returns the number of dropped lines of the access log; None: there is no log."""
        self._routes: defaultdict[tuple[str, int], int] = defaultdict(int)
        self._start_s = time.time()

    def model(self, name: str, version: int) -> ModelStats:
        """Returns the statistics of one version, kept after an unload. The name must come from the registry."""
        found = self.models.get((name, version))
        if found is None:
            found = self.models[name, version] = ModelStats(name, version)
            self._forget_oldest()
        return found

    def loaded(self, name: str, version: int, load_s: float, pending: Callable[[], int] | None = None) -> ModelStats:
        """Records a version that was loaded.

        Args:
            name: name of the model.
            version: number of the version.
            load_s: time of the load, from the first byte read to the end of the warm-up.
            pending: returns the number of requests that wait for it.
        """
        stats = self.model(name, version)
        stats.loads += 1
        stats.load_s += load_s
        stats.is_loaded = True
        stats.pending = pending
        return stats

    def load_failed(self, name: str, version: int) -> None:
        """Records a version that could not be loaded."""
        self.model(name, version).load_failures += 1

    def evicted(self, name: str, version: int) -> None:
        """Records a version that was removed from memory."""
        stats = self.model(name, version)
        stats.evictions += 1
        stats.is_loaded = False
        stats.pending = None

    def answered(self, route: str, status: int) -> None:
        """Records a response without a model version: of another route than infer, or for a model not found.

        Args:
            route: a name from our own code, never a path.
            status: status of the response.
        """
        self._routes[route, status] += 1

    def snapshot(self) -> dict[str, Any]:
        """Plain JSON values: pool, replica, start_ms, connections, connections_total, log_drops, routes, models."""
        return {
            "pool": self.pool,
            "replica": self.replica,
            "start_ms": int(self._start_s * 1e3),
            "connections": self.connections,
            "connections_total": self.connections_total,
            "log_drops": 0 if self.log_drops is None else self.log_drops(),
            "routes": [[route, status, count] for (route, status), count in sorted(self._routes.items())],
            "models": [stats.snapshot() for _, stats in sorted(self.models.items())],
        }

    def _forget_oldest(self) -> None:
        gone = [key for key, stats in self.models.items() if not stats.is_loaded]
        if len(gone) > MAX_KEPT:
            del self.models[min(gone[:-1], key=lambda key: self.models[key]._last_s)]  # the last one is the new one


def merge(snapshots: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sums snapshots of the same model version from several replicas; `last_ms` is the latest.

    Raises:
        ValueError: there are no snapshots.
    """
    if not snapshots:
        raise ValueError("no snapshots to merge; a version without counts has an empty snapshot")
    merged: dict[str, Any] = {"model": snapshots[0]["model"], "version": snapshots[0]["version"]}
    for key, first in snapshots[0].items():
        values = [snapshot[key] for snapshot in snapshots]
        if key == "outcomes":
            merged[key] = {outcome: sum(value[outcome] for value in values) for outcome in first}
        elif key in ("queue", "compute", "request"):
            counts = [sum(column) for column in zip(*(value["counts"] for value in values), strict=True)]
            merged[key] = {"counts": counts, "ns": sum(value["ns"] for value in values)}
        elif key == "batches":
            sizes: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0])
            for size, runs, run_ns in (batch for value in values for batch in value):
                sizes[size][0] += runs
                sizes[size][1] += run_ns
            merged[key] = [[size, *sums] for size, sums in sorted(sizes.items())]
        elif key == "last_ms":
            merged[key] = max(values)
        elif key not in ("model", "version"):
            merged[key] = sum(values)
    return merged


def merge_pool(replicas: Iterable[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """Returns the merged counts of every model version, ascending, from the snapshots of a pool's replicas."""
    found: defaultdict[tuple[str, int], list[Mapping[str, Any]]] = defaultdict(list)
    for replica in replicas:
        for model in replica["models"]:
            found[model["model"], model["version"]].append(model)
    return {key: merge(found[key]) for key in sorted(found)}


def _buckets() -> list[int]:
    return [0] * (len(BOUNDS_S) + 1)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
