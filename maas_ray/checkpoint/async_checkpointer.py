"""Saves checkpoints in the background: a training step waits for a copy in memory, not for the store."""

import contextlib
import copy
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch.distributed as dist
from torch import Tensor

from maas_ray.checkpoint.catalog import KIND, place
from maas_ray.checkpoint.collectives import TIMEOUT_S, Collectives
from maas_ray.checkpoint.parts import PartLayout
from maas_ray.checkpoint.plan import Planner, SaveAttempt
from maas_ray.checkpoint.retention import Keep, Retention
from maas_ray.checkpoint.save import Fence, Snapshot, finish
from maas_ray.checkpoint.upload import Staging, UploadSource
from maas_ray.display import get_logger
from maas_ray.errors import MaasError, SaveFailed
from maas_ray.store.manifest import Committed, open_committed
from maas_ray.store.objects import ObjectStore

log = get_logger(__name__)


class AsyncCheckpointer:
    """Saves one state at a time in the background of training.

    `save` waits for the previous save (bounded), copies this rank's tensors to buffers that are reused, and returns; a
    thread hashes, uploads, agrees with the other ranks and commits. All ranks call the same methods in the same order
    and get the same outcome.

    Tensors that do not change until the next update of the weights, which are most tensors, need not be copied before
    `save` returns (Mohan et al. 2021, CheckFreq): the thread copies them while the next gradients are computed, and
    `staged` waits for that copy before the update.

    A failed save fails on every rank and commits nothing; it is logged and training continues. After `max_failures`
    consecutive failures, or at once if the store is not the cause (the run is not repeatable), the next `save` or
    `wait` raises the failure.

    Args:
        store: where to write.
        prefix: prefix of the run's checkpoints; each is committed at `<prefix>/<step>`.
        group: the ranks, in a group that nothing else uses, see `saving_group`; None: one process.
        timeout_s: longest time for writing the parts of one checkpoint.
        keep: retention rules; None: keep everything.
        max_failures: maximum number of consecutive failures.
        late: rank 0's metrics by step that become known after the commit, for retention.
        on_commit: called on rank 0 with each committed checkpoint, in the background; its errors are logged.
        fence: called on rank 0 around each commit; raises `Conflict` once this process must not commit.
    """

    def __init__(
        self,
        store: ObjectStore,
        prefix: str,
        *,
        group: dist.ProcessGroup | None = None,
        timeout_s: float = TIMEOUT_S,
        keep: Keep | None = None,
        max_failures: int = 3,
        on_commit: Callable[[Committed], None] | None = None,
        late: Mapping[int, Mapping[str, float]] | None = None,
        fence: Fence | None = None,
    ) -> None:
        self._store = store
        self._prefix = prefix
        self._collectives = Collectives(group)
        self._timeout_s = timeout_s
        self._retention = (
            Retention(store, prefix, keep, late) if keep is not None and self._collectives.rank == 0 else None
        )
        self._max_failures = max_failures
        self._on_commit = on_commit if self._collectives.rank == 0 else None
        self._fence = fence
        self._planner = Planner(self._collectives)
        self._staging = Staging()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._flight: tuple[int, Future[None]] | None = None
        self._copy: SteadyCopy | None = None
        self._steady: frozenset[str] | None = None
        self._num_failures = 0
        self.failure: MaasError | None = None
        """Why the last save failed; None if it did not."""
        self.committed_step: int | None = None
        """The newest step that this checkpointer committed."""

    def save(self, snapshot: Snapshot, *, steady: Collection[str] = ()) -> None:
        """Starts saving a state; the tensors may change once this returns, but `steady` ones only after `staged`.

        Args:
            snapshot: this rank's part of the state.
            steady: names of tensors that do not change before `staged` is called. The first save detects those that
                change nevertheless; they are copied at once.

        Raises:
            MaasError: an earlier save, or this one, exceeded the maximum number of failures.
        """
        self.wait()
        try:
            attempt = self._planner.prepare(snapshot.step, snapshot.tensors)
        except SaveFailed as error:
            self._note(snapshot.step, error)
            self._raise_if_too_many()
            return
        copied = self._copy = SteadyCopy(attempt, {name: snapshot.tensors[name] for name in steady}, self._steady)
        source: UploadSource = self._staging
        try:
            self._staging.fill(attempt, copied.later)
        except Exception as error:  # no memory for the copy: this rank is late, the others wait in `finish`
            source = _Failed(f"cannot copy the state in memory: {error}")
        # Other values are copied too, because the loop keeps appending to its history. Nothing keeps the tensors alive.
        kept = Snapshot(snapshot.step, snapshot.cursor, {}, copy.deepcopy(dict(snapshot.meta)), list(snapshot.history))
        planned = replace(attempt, pieces={})
        self._flight = (snapshot.step, self._thread.submit(self._finish, planned, kept, source, copied))

    def staged(self) -> None:
        """Waits until the copy of the save in flight is complete; all of its tensors may then change.

        Raises:
            SaveFailed: the copy does not end in time; the tensors must not change.
        """
        if self._copy is not None:
            self._steady = self._copy.wait(self._timeout_s)
            self._copy = None

    def wait(self, *, is_strict: bool = False) -> int | None:
        """Waits for the save in flight; returns the newest step that this checkpointer committed.

        Args:
            is_strict: raise the failure of the last save even if it was the first one, for a state that must be saved.

        Raises:
            MaasError: the last save exceeded the maximum number of failures.
        """
        self.staged()
        if self._flight is not None:
            step, future = self._flight
            self._flight = None
            try:
                # The save's own waits are bounded: parts, three messages, the store's retries. This bounds the rest.
                future.result(timeout=6 * self._timeout_s + 300)
            except MaasError as error:
                self._note(step, error)
            except TimeoutError:
                self._note(
                    step, SaveFailed(f"rank {self._collectives.rank}: saving step {step} did not end in time; aborted")
                )
            else:
                self.failure, self._num_failures, self.committed_step = None, 0, step
        if is_strict and self.failure is not None:
            raise self.failure
        self._raise_if_too_many()
        return self.committed_step

    def close(self) -> None:
        """Waits for the save in flight and releases the thread and the buffers; raises nothing (see `failure`)."""
        with contextlib.suppress(MaasError):
            self.wait()
        self._thread.shutdown(wait=False)
        self._staging = Staging()

    def _finish(self, attempt: SaveAttempt, snapshot: Snapshot, source: UploadSource, copied: "SteadyCopy") -> None:
        try:
            copied.run(self._staging)
        except Exception as error:  # the other ranks must receive it
            source = _Failed(str(error))
        finish(
            self._store, self._prefix, self._collectives, attempt, snapshot, source, self._timeout_s, fence=self._fence
        )
        try:
            if self._on_commit is not None:
                self._on_commit(open_committed(self._store, place(self._prefix, snapshot.step), KIND))
            if self._retention is not None:
                self._retention.apply()
        except Exception:  # the checkpoint is committed: the next save tries again
            log.warning("step %d is committed, but retention or a callback failed", snapshot.step, exc_info=True)

    def _note(self, step: int, error: MaasError) -> None:
        self.failure = error
        self._num_failures += 1
        log.warning("step %d was not saved (failure %d in a row): %s", step, self._num_failures, error)

    def _raise_if_too_many(self) -> None:
        if self.failure is not None and (self._num_failures >= self._max_failures or not self.failure.retryable):
            raise self.failure


class SteadyCopy:
    """The part of the copy that is made while gradients are computed.

    Autograd's counter of in-place changes shows whether a tensor changes meanwhile.

    Args:
        attempt: the attempt to save.
        steady: tensors that are declared not to change, by name.
        known: those that did not change after the previous save; None: not known yet.
    """

    def __init__(self, attempt: SaveAttempt, steady: Mapping[str, Tensor], known: frozenset[str] | None) -> None:
        self._attempt = attempt
        self._tensors = {name: tensor for name, tensor in steady.items() if name in attempt.pieces}
        self._versions = {name: tensor._version for name, tensor in self._tensors.items()}
        self._is_copied = threading.Event()
        self.later = {name: attempt.pieces[name] for name in known or () if name in self._tensors}

    def run(self, staging: Staging) -> None:
        """Raises `SaveFailed` if a tensor has changed, so that the copy is not a consistent state."""
        try:
            if self.later:
                staging.fill_later(self._attempt, self.later)
            if changed := self.later.keys() - self._unchanged():
                raise SaveFailed(f"{min(changed)} changed while it was being copied; the next save copies it at once")
        finally:
            self._is_copied.set()

    def wait(self, timeout_s: float) -> frozenset[str]:
        """Waits for the copy; returns the names of the tensors that have not changed since the save began."""
        if not self._is_copied.wait(timeout_s):
            raise SaveFailed(f"the copy of the state at step {self._attempt.step} did not end within {timeout_s:g} s")
        return self._unchanged()

    def _unchanged(self) -> frozenset[str]:
        return frozenset(name for name, tensor in self._tensors.items() if tensor._version == self._versions[name])


class _Failed:
    """A source without data, which raises."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def lend(self, number: int, layout: PartLayout) -> contextlib.AbstractContextManager[Tensor]:
        raise SaveFailed(self._reason)
