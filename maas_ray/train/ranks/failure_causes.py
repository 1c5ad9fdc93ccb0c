"""What lies behind the errors with which Ray Train ends an attempt. Knows their attributes, and no class of ray.train."""

import ray

from maas_ray.errors import MaasError, Preempted, RanksMissing, TrainingFailed
from maas_ray.train.ranks.rank_registry import RankRegistry
from maas_ray.train.ranks.run_actor import Launch

_WAITED_OUT = ("Timed out waiting", "ollective operation timeout")
"""In what gloo and NCCL say."""


def preempted(job: Launch, ranks: RankRegistry) -> Preempted:
    """What a run ends with that was asked to."""
    step = f"step {ranks.committed} is committed" if ranks.committed else "nothing was committed yet"
    return Preempted(f"run {job.run!r} was asked to end ({ranks.final}); {step}: give --resume to go on")


def has_waited_out(error: Exception | None) -> bool:
    """Whether a rank gave up waiting for another one. Torch has no class of its own for that."""
    return error is not None and any(words in str(error) for words in _WAITED_OUT)


def find_cause(error: Exception) -> tuple[int | None, Exception]:
    """What lies behind an error of Ray Train: the rank, if it is one, and the first cause rather than what follows."""
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
    """Ranks that lose another one fail too, with whatever their connection or their save says."""
    if isinstance(error, RanksMissing) or (isinstance(error, MaasError) and not error.retryable):
        return 0
    return 1 if isinstance(error, ray.exceptions.RayError) else 2


def explain(job: Launch, error: Exception) -> MaasError:
    """Our own error if it is one, else a summary that names rank and cause."""
    rank, cause = find_cause(error)
    if isinstance(cause, MaasError) and not isinstance(cause, RanksMissing):
        return cause
    kept = "committed checkpoints are kept: mend the cause and give --resume"
    if isinstance(cause, RanksMissing):
        return RanksMissing(f"run {job.run!r} ended after {job.max_restarts} restarts in a row; {cause}; {kept}")
    if rank is None:
        return TrainingFailed(f"run {job.run!r} ended: {cause}; {kept}")
    return TrainingFailed(
        f"run {job.run!r} ended after {job.max_restarts} restarts in a row; rank {rank}: {type(cause).__name__}: {cause}; "
        f"{kept}"
    )
