"""The numbers of a run, and the steps at which the loop validates, commits and ends an epoch. Independent of torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from maas_ray.train.spec.length import ExtensionSpec, position_of


@dataclass(frozen=True)
class LoopPlan:
    """The numbers of a run, the same on every rank.

    Attributes:
        total_steps: optimizer steps of the whole run.
        stop: global sample position at which the run ends.
        global_size: samples per step over all ranks; the last step may have fewer.
        num_rows: rows of the training split.
        log_every: steps between logged losses.
        checkpoint_every: steps between checkpoints; None: at the end of each epoch.
        validate_every: steps between validations; None: at the end of each epoch.
        extensions: extensions of the run, oldest first.
        saves_validated: whether validated states are committed too, since each may be the best.
    """

    total_steps: int
    stop: int
    global_size: int
    num_rows: int
    seed: int
    log_every: int
    checkpoint_every: int | None
    validate_every: int | None
    max_grad_norm: float | None
    precision: str
    extensions: Sequence[ExtensionSpec] = ()
    saves_validated: bool = False

    def ends_epoch(self, step: int) -> bool:
        """Whether the batch of step number `step` (from 0) takes the last sample of an epoch."""
        first, after = self.position(step), min(self.position(step) + self.global_size, self.stop)
        return first // self.num_rows != after // self.num_rows

    def is_checkpoint(self, step: int) -> bool:
        """Whether the state after step number `step` (from 0) must be committed."""
        return self._is_due(step, self.checkpoint_every)

    def is_validated(self, step: int) -> bool:
        """Whether step number `step` (from 0) is followed by a validation."""
        return self._is_due(step, self.validate_every)

    def epoch(self, done: int) -> float:
        """Passes over the training split after `done` steps."""
        return self.position(done) / self.num_rows

    def position(self, done: int) -> int:
        """Global sample position after `done` steps."""
        return min(position_of(done, self.global_size, self.extensions), self.stop)

    def _is_due(self, step: int, every: int | None) -> bool:
        if step + 1 == self.total_steps:
            return True
        return self.ends_epoch(step) if every is None else (step + 1) % every == 0
