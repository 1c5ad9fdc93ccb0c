"""Statistics of a replica, compared with an independent ledger."""

import asyncio
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from maas_ray.bundle.engine.engine import Engine
from maas_ray.errors import (
    BadRequest,
    BodyTooLarge,
    DeadlineExceeded,
    MaasError,
    NotFound,
    Overloaded,
)
from maas_ray.serve.batching.batcher import Batcher
from maas_ray.serve.batching.item import Item
from maas_ray.serve.batching.runner import EngineRunner
from maas_ray.serve.batching.spec import BatchSpec
from maas_ray.serve.telemetry import stats as stats_module
from maas_ray.serve.telemetry.stats import (
    BOUNDS_S,
    MAX_EXACT_ROWS,
    OUTCOMES,
    ModelStats,
    ReplicaStats,
    merge,
    merge_pool,
    outcome_of,
)
from tests.support.onnx_models import LOOKUP, lookup, make_bundle
from tests.support.rig import Waits


@dataclass
class Ledger:
    """Everything that happened, as a list; sums are made of it only at the end."""

    waits: list[float] = field(default_factory=list)
    runs: list[tuple[int, int, float]] = field(default_factory=list)
    conversions: list[tuple[float, float]] = field(default_factory=list)
    ends: list[tuple[str, float, int, float]] = field(default_factory=list)

    def check(self, snapshot: dict[str, Any]) -> None:
        """Fails unless a snapshot matches the events exactly."""
        ok = [end for end in self.ends if end[0] == "ok"]
        assert snapshot["outcomes"] == {name: sum(end[0] == name for end in self.ends) for name in OUTCOMES}
        assert snapshot["rows"] == sum(end[2] for end in ok)
        assert snapshot["rows_run"] == sum(rows for _, rows, _ in self.runs)
        assert snapshot["fail_ns"] == in_ns(end[1] for end in self.ends if end[0] != "ok")
        assert snapshot["last_ms"] == int(1000 * self.ends[-1][3]) if self.ends else 0
        assert snapshot["converted"] == len(self.conversions)
        assert snapshot["read_ns"] == in_ns(read for read, _ in self.conversions)
        assert snapshot["write_ns"] == in_ns(write for _, write in self.conversions)
        check_histogram(snapshot["queue"], self.waits)
        check_histogram(snapshot["request"], [end[1] for end in ok])
        check_histogram(snapshot["compute"], [run_s for requests, _, run_s in self.runs for _ in range(requests)])
        sizes = sorted({rows for _, rows, _ in self.runs})
        assert snapshot["batches"] == [
            [size, len(times), in_ns(times)]
            for size in sizes
            for times in [[run_s for _, rows, run_s in self.runs if rows == size]]
        ]


def in_ns(seconds: Any) -> Any:
    return pytest.approx(sum(seconds) * 1e9, abs=2)


def check_histogram(histogram: dict[str, Any], values: list[float]) -> None:
    edges = [-1.0, *BOUNDS_S, float("inf")]
    counts = [sum(low < value <= high for value in values) for low, high in pairwise(edges)]
    assert histogram["counts"] == counts
    assert histogram["ns"] == in_ns(values)


def live(stats: ModelStats, seed: int, num_requests: int = 400) -> Ledger:
    """Plays a life of random requests and notes it in a ledger as well."""
    chance = random.Random(seed)
    ledger = Ledger()
    now_s = 1.7e9
    while len(ledger.ends) < num_requests:
        batch = [chance.randint(1, 9) for _ in range(chance.randint(1, 12))]
        for rows in batch:
            wait = chance.choice([0.0, *BOUNDS_S, chance.uniform(0, 40)])
            ledger.waits.append(wait)
            stats.waited([Waits()], wait)
        run = (len(batch), sum(batch), chance.uniform(1e-5, 0.2))
        ledger.runs.append(run)
        stats.ran(*run)
        for rows in batch:
            now_s += chance.random()
            end = (chance.choice(OUTCOMES), chance.uniform(0, 40), rows, now_s)
            ledger.ends.append(end)
            if end[0] == "ok":
                conversion = (chance.uniform(0, 1e-3), chance.uniform(0, 1e-3))
                ledger.conversions.append(conversion)
                stats.served(*conversion, *end[1:])
            else:
                stats.finished(*end)
    return ledger


@pytest.mark.parametrize("seed", range(3))
def test_a_snapshot_counts_exactly_what_happened(seed: int) -> None:
    stats = ModelStats("m", 1)
    ledger = live(stats, seed)
    ledger.check(stats.snapshot())


class CountsTwice(ModelStats):
    def finished(self, outcome: Any, total_s: float, num_rows: int, now_s: float) -> None:
        super().finished(outcome, total_s, num_rows, now_s)
        if total_s > 39:
            super().finished(outcome, total_s, num_rows, now_s)


class LosesRuns(ModelStats):
    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        if num_rows > 20:
            super().ran(num_requests, num_rows, run_s)


class MixesUpRowsAndRequests(ModelStats):
    def ran(self, num_requests: int, num_rows: int, run_s: float) -> None:
        super().ran(num_rows, num_requests, run_s)


class CountsABoundOneBucketTooHigh(ModelStats):
    def waited(self, items: Sequence[Any], now_s: float) -> None:
        super().waited(items, now_s * (1 + 1e-12))


@pytest.mark.parametrize("kind", [CountsTwice, LosesRuns, MixesUpRowsAndRequests, CountsABoundOneBucketTooHigh])
def test_a_wrong_count_is_caught(kind: type[ModelStats]) -> None:
    stats = kind("m", 1)
    ledger = live(stats, seed=0)
    with pytest.raises(AssertionError):
        ledger.check(stats.snapshot())


def test_each_request_waits_once_and_runs_once_even_with_poison() -> None:
    stats = ModelStats("m", 1)
    num_requests, num_poison = 120, 3

    async def main() -> list[Item]:
        loop = asyncio.get_running_loop()
        runner = EngineRunner(Engine(make_bundle(lookup(), LOOKUP)), loop)
        batcher = Batcher(runner, BatchSpec(max_batch_size=32), loop, can_merge=True, stats=stats)
        futures: list[asyncio.Future[None]] = [loop.create_future() for _ in range(num_requests)]
        items = []
        for number, future in enumerate(futures):
            index = np.full((2, 1), 99 if number % 40 == 7 else number % 5, np.int64)
            item = batcher.submit(
                {"index": index}, 2, 16, loop.time() + 30, lambda _, __, future=future: future.set_result(None)
            )
            items.append(item)
        await asyncio.wait_for(asyncio.gather(*futures), 30)
        runner.close()
        return items

    items = asyncio.run(main())
    snapshot = stats.snapshot()
    num_good = num_requests - num_poison
    assert sum(snapshot["queue"]["counts"]) == num_requests
    assert sum(snapshot["compute"]["counts"]) == num_good
    assert sum(size * runs for size, runs, _ in snapshot["batches"]) == snapshot["rows_run"] == 2 * num_good
    assert snapshot["queue"]["ns"] == pytest.approx(sum(item.queue_s for item in items) * 1e9, abs=2)
    assert snapshot["compute"]["ns"] == pytest.approx(sum(item.run_s for item in items) * 1e9, abs=2)
    assert sum(item.run_s > 0 for item in items) == num_good


def test_snapshots_of_several_replicas_add_up() -> None:
    parts = [ModelStats("m", 1) for _ in range(3)]
    ledgers = [live(stats, seed) for seed, stats in enumerate(parts)]
    total = Ledger()
    for ledger in ledgers:
        for name in ("waits", "runs", "conversions", "ends"):
            getattr(total, name).extend(getattr(ledger, name))
    total.ends.sort(key=lambda end: end[3])
    snapshots = json.loads(json.dumps([stats.snapshot() for stats in parts]))
    total.check(merge(snapshots))
    assert merge(snapshots[:1]) == snapshots[0]
    assert merge(snapshots).keys() == snapshots[0].keys()
    with pytest.raises(ValueError, match="no snapshot"):
        merge([])


def test_a_pool_is_summed_by_version() -> None:
    replicas = [ReplicaStats("p", name) for name in ("a", "b")]
    for replica in replicas:
        for version in (1, 2):
            replica.loaded("m", version, 0.5, pending=lambda: 4).served(0.0, 0.0, 0.1, version, 1.0)
    replicas[1].loaded("only-b", 1, 0.5)
    merged = merge_pool([replica.snapshot() for replica in replicas])
    assert list(merged) == [("m", 1), ("m", 2), ("only-b", 1)]
    assert [entry["rows"] for entry in merged.values()] == [2, 4, 0]
    assert [entry["pending"] for entry in merged.values()] == [8, 8, 0]
    assert [entry["loaded"] for entry in merged.values()] == [2, 2, 1]


def test_callers_cannot_make_the_batch_sizes_many() -> None:
    stats = ModelStats("m", 1)
    for rows in range(1, 5000):
        stats.ran(1, rows, 0.001)
    snapshot = stats.snapshot()
    assert len(snapshot["batches"]) == MAX_EXACT_ROWS + 5
    assert snapshot["batches"][-1][:2] == [8192, 4999 - 4096]
    assert snapshot["rows_run"] == sum(range(1, 5000))


def test_counts_outlive_the_time_in_memory() -> None:
    replica = ReplicaStats()
    replica.loaded("m", 1, 0.5, pending=lambda: 7).served(0.0, 0.0, 0.1, 1, 1.0)
    replica.load_failed("m", 2)
    assert replica.snapshot()["models"][0]["pending"] == 7
    replica.evicted("m", 1)
    replica.loaded("m", 1, 0.25)
    replica.evicted("m", 1)
    first, second = replica.snapshot()["models"]
    assert [first[key] for key in ("outcomes", "loads", "evictions", "load_ns", "loaded", "pending")] == [
        {**dict.fromkeys(OUTCOMES, 0), "ok": 1}, 2, 2, 750_000_000, 0, 0,
    ]  # fmt: skip
    assert second["load_failures"] == 1


def test_versions_out_of_memory_are_forgotten_oldest_first_and_loaded_ones_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stats_module, "MAX_KEPT", 3)
    replica = ReplicaStats()
    replica.loaded("stays", 1, 0.1)
    for version in range(1, 7):
        replica.loaded("m", version, 0.1).served(0.0, 0.0, 0.1, 1, 100.0 - version)
        replica.evicted("m", version)
    assert sorted(replica.models) == [("m", 1), ("m", 2), ("m", 6), ("stays", 1)]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (None, "ok"),
        (BadRequest("x"), "bad_request"),
        (BodyTooLarge("x"), "bad_request"),
        (NotFound("x"), "bad_request"),
        (Overloaded("x"), "overloaded"),
        (DeadlineExceeded("x"), "expired"),
        (MaasError("x"), "failed"),
    ],
)
def test_each_error_has_its_outcome(error: MaasError | None, outcome: str) -> None:
    assert outcome_of(error) == outcome
