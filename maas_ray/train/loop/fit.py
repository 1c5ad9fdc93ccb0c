"""The training loop in plain torch: no Ray, no store, no files. Each rank calls `fit` once.

A run is reproducible despite interruptions, and the same training on every layout, because:
- the sample order is a function of (seed, position); the batch of step s starts at position s x global_size (after an
  extension, at the position of its first step plus the steps since then),
- dropout masks are functions of (seed, position of the sample); other random numbers of step s are seeded by
  (seed, s, r), where r is the data-parallel rank,
- gradients are summed over the ranks and divided by the number of samples (or valid tokens, or the sum of the weights of
  samples) of the GLOBAL batch,
- the order in which DistributedDataParallel sums gradients is fixed before the first step (`warm_up_buckets`).
So step s + 1 depends only on the state after step s.
"""

import time

from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.progress import Progress
from maas_ray.train.loop.step import Batches, mean_loss, train_step
from maas_ray.train.loop.train_state import TrainState


class LoopHooks:
    """What the loop calls, on every rank after the same steps; override what a run needs."""

    validates = False
    """Whether there is anything to validate with."""

    def begin_step(self, step: int) -> None:
        """Before each step; steps count from 1."""

    def report(self, progress: Progress) -> None:
        """After each logged step."""

    def validate(self, done: int) -> None:
        """In evaluation mode, with the number of steps done, at the steps of the plan and after the last step."""

    def should_stop(self, is_validated: bool) -> bool:
        """After each logged step, after each validation (true), and before the first step of a run that continues.

        Every rank returns the same. The state after the step at which it is true is the last.
        """
        return False

    def should_leave(self, done: int) -> bool:
        """After each step but the last. Where it is true, the state is committed, and the run continues elsewhere."""
        return False

    def save(self, done: int) -> None:
        """When the state is to be committed, with the number of steps done."""


def fit(plan: LoopPlan, state: TrainState, loader: Batches, first_step: int, hooks: LoopHooks) -> bool:
    """Trains from `first_step` to the end, until a hook stops it, or to where one interrupts it.

    Args:
        plan: the numbers of the run.
        state: model, loss and optimizer of this rank, with the state after `first_step` steps.
        loader: this rank's share of each global batch.
        first_step: steps that are done already.
        hooks: called on every rank.

    Returns:
        Whether the run is done; False if it was interrupted.

    Raises:
        TrainingFailed: the loss is not finite.
    """
    if first_step and hooks.should_stop(True):
        return True  # it was decided before the last commit
    state.train()
    logged_at, logged_s = first_step, time.perf_counter()
    for step in range(first_step, plan.total_steps):
        hooks.begin_step(step + 1)
        lr = state.schedule.lr
        loss, _ = train_step(plan, state, loader, step)
        done = step + 1
        is_logged = done % plan.log_every == 0 or done == plan.total_steps
        is_validated = hooks.validates and plan.is_validated(step)
        if is_logged:
            mean = mean_loss(state, loss, step)
            rate = (done - logged_at) * plan.global_size / (time.perf_counter() - logged_s)
            auxiliary = state.auxiliary.means(state.coordinates.layout.tp) if state.auxiliary is not None else {}
            hooks.report(Progress(done, plan.total_steps, plan.epoch(done), mean, lr, rate, auxiliary=auxiliary))
            logged_at, logged_s = done, time.perf_counter()
        if is_validated:
            _validate(state, hooks, done)
        is_last = (is_logged or is_validated) and hooks.should_stop(is_validated)
        if hooks.validates and is_last and not is_validated:
            _validate(state, hooks, done)
        is_interrupted = not is_last and done < plan.total_steps and hooks.should_leave(done)
        if plan.is_checkpoint(step) or (is_validated and plan.saves_validated) or is_last or is_interrupted:
            hooks.save(done)
        if is_last:
            return True
        if is_interrupted:
            return False
    return True


def _validate(state: TrainState, hooks: LoopHooks, done: int) -> None:
    state.train(False)
    hooks.validate(done)
    state.train()
