"""Finds the causes of Ray Train's errors by their attributes. Independent of ray.train's classes."""

from collections.abc import Sequence

import ray

from maas_ray.errors import MaasError, Preempted, RanksMissing, TrainingFailed
from maas_ray.train.ranks.rank_registry import GroupAttempt, RankRegistry
from maas_ray.train.ranks.run_actor import Launch

_WAITED_OUT = ("Timed out waiting", "ollective operation timeout")
"""Parts of the timeout messages of gloo and NCCL."""
_OF_THE_MACHINE = (*_WAITED_OUT, "Connection ", "unbound_buffer", "NCCL", "CUDA", "gloo", "out of memory", "alloc")
"""Parts of messages of RuntimeErrors about networks, devices and memory. Torch has few error classes for them."""


def preempted(job: Launch, ranks: RankRegistry) -> Preempted:
    """The error of a run that was asked to end."""
    step = f"step {ranks.committed} is committed" if ranks.committed else "no checkpoint is committed yet"
    return Preempted(f"run {job.run!r} was asked to end ({ranks.final}); {step}; continue it with --resume")


def has_waited_out(error: Exception | None) -> bool:
    """Whether a rank timed out waiting for another one. Torch has no error class for it."""
    return error is not None and any(words in str(error) for words in _WAITED_OUT)


def is_transient(error: Exception) -> bool:
    """Whether a restart may help although the data and the code are the same: an error of a machine or a network."""
    if isinstance(error, MaasError):
        return error.retryable
    if isinstance(error, ray.exceptions.RayError | OSError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OF_THE_MACHINE)


def recurs(error: Exception, past: Sequence[GroupAttempt]) -> bool:
    """Whether the last two attempts ended after the same step with the same error, which is not transient.

    Steps are deterministic, so that a third attempt would end there too.

    Args:
        error: the cause of the end of the last attempt.
        past: the ended attempts, including the last one.
    """
    if len(past) < 2 or is_transient(error):
        return False
    before, last = past[-2:]
    return (before.reached, before.reason) == (last.reached, last.reason)


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
    if isinstance(error, ray.exceptions.RayError):
        return 1
    return 3 if is_transient(error) else 2


def explain(job: Launch, error: Exception, past: Sequence[GroupAttempt] = ()) -> MaasError:
    """The cause if it is one of our errors, else a summary with rank and cause.

    Args:
        job: the launch.
        error: Ray Train's error.
        past: the ended attempts.
    """
    rank, cause = find_cause(error)
    if isinstance(cause, MaasError) and not isinstance(cause, RanksMissing):
        return cause
    kept = "committed checkpoints are kept: fix the cause and continue with --resume"
    if isinstance(cause, RanksMissing):
        return RanksMissing(f"run {job.run!r} failed after {job.max_restarts} consecutive restarts; {cause}; {kept}")
    if rank is None:
        return TrainingFailed(f"run {job.run!r} failed: {cause}; {kept}")
    if recurs(cause, past):
        step = f"after step {past[-1].reached}" if past[-1].reached else "before its first step"
        return TrainingFailed(
            f"run {job.run!r} failed twice {step} with the same error, which another restart would repeat; rank {rank}: "
            f"{type(cause).__name__}: {cause}; {kept}"
        )
    return TrainingFailed(
        f"run {job.run!r} failed after {job.max_restarts} consecutive restarts; rank {rank}: {type(cause).__name__}: "
        f"{cause}; {kept}"
    )
