"""Finds the causes of Ray Train's errors by their attributes. Independent of ray.train's classes."""

import ray

from maas_ray.errors import MaasError, Preempted, RanksMissing, TrainingFailed
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.run_actor import Launch

_WAITED_OUT = ("Timed out waiting", "ollective operation timeout")
"""Parts of the timeout messages of gloo and NCCL."""


def preempted(job: Launch, ranks: RankRegistry) -> Preempted:
    """The error of a run that was asked to end."""
    step = f"step {ranks.committed} is committed" if ranks.committed else "no checkpoint is committed yet"
    return Preempted(f"run {job.run!r} was asked to end ({ranks.final}); {step}; continue it with --resume")


def has_waited_out(error: Exception | None) -> bool:
    """Whether a rank timed out waiting for another one. Torch has no error class for it."""
    return error is not None and any(words in str(error) for words in _WAITED_OUT)


def find_cause(error: Exception) -> tuple[int | None, Exception]:
    """The cause of an error of Ray Train: the rank, if any, and the first error instead of its consequences."""
    failure = getattr(error, "controller_failure", None)
    if isinstance(failure, Exception):
        return None, failure
    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    found = {rank: _unwrapped(failure) for rank, failure in failures.items()}
    first = min(found, key=lambda rank: (_place_in_causes(found[rank]), rank), default=None)
    return (None, error) if first is None else (first, found[first])


def _unwrapped(failure: Exception) -> Exception:
    cause = getattr(failure, "health_check_failure", None) or getattr(failure, "base_exc", None) or failure.__cause__
    return cause if isinstance(cause, Exception) else failure


def _place_in_causes(error: Exception) -> int:
    """Order of causes: ranks that lose another rank fail too, with an error of their connection or save."""
    if isinstance(error, RanksMissing) or (isinstance(error, MaasError) and not error.retryable):
        return 0
    return 1 if isinstance(error, ray.exceptions.RayError) else 2


def explain(job: Launch, error: Exception) -> MaasError:
    """The cause if it is one of our errors, else a summary with rank and cause."""
    rank, cause = find_cause(error)
    if isinstance(cause, MaasError) and not isinstance(cause, RanksMissing):
        return cause
    kept = "committed checkpoints are kept: fix the cause and continue with --resume"
    if isinstance(cause, RanksMissing):
        return RanksMissing(f"run {job.run!r} failed after {job.max_restarts} consecutive restarts; {cause}; {kept}")
    if rank is None:
        return TrainingFailed(f"run {job.run!r} failed: {cause}; {kept}")
    return TrainingFailed(
        f"run {job.run!r} failed after {job.max_restarts} consecutive restarts; rank {rank}: {type(cause).__name__}: "
        f"{cause}; {kept}"
    )
