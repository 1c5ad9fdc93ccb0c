"""Statistics of one model version, as the v2 statistics extension defines them.

Source: triton-inference-server/server, docs/protocol/extension_statistics.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, slots=True)
class Duration:
    """Number of events, and their total time."""

    count: int
    ns: int


class BatchStatistics(NamedTuple):
    """Runs of one size."""

    batch_size: int
    """Rows; above `stats.MAX_EXACT_ROWS` the next power of two."""
    runs: Duration


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """An entry of `model_stats`. Parsing counts as input, writing as output; there is no response cache."""

    name: str
    version: int
    last_inference_ms: int
    """Time of the last request, since the epoch."""
    inference_count: int
    """Rows of successful requests."""
    execution_count: int
    """Runs."""
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batches: tuple[BatchStatistics, ...]


def model_statistics(snapshot: Mapping[str, Any]) -> ModelStatistics:
    """Returns the statistics in a snapshot of `stats.ModelStats`, or in several merged ones."""
    outcomes = snapshot["outcomes"]
    num_ok = outcomes["ok"]
    return ModelStatistics(
        name=snapshot["model"],
        version=snapshot["version"],
        last_inference_ms=snapshot["last_ms"],
        inference_count=snapshot["rows"],
        execution_count=sum(runs for _, runs, _ in snapshot["batches"]),
        success=Duration(num_ok, snapshot["request"]["ns"]),
        fail=Duration(sum(outcomes.values()) - num_ok, snapshot["fail_ns"]),
        queue=_of_histogram(snapshot["queue"]),
        compute_input=Duration(snapshot["converted"], snapshot["read_ns"]),
        compute_infer=_of_histogram(snapshot["compute"]),
        compute_output=Duration(snapshot["converted"], snapshot["write_ns"]),
        batches=tuple(BatchStatistics(size, Duration(runs, run_ns)) for size, runs, run_ns in snapshot["batches"]),
    )


def _of_histogram(histogram: Mapping[str, Any]) -> Duration:
    return Duration(sum(histogram["counts"]), histogram["ns"])
