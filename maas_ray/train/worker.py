"""One rank of a run: builds its part, loads the newest committed state, trains to the end. Knows no ray.train.

Kept apart from train/run.py so that the processes that train import only what training needs.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import ray
import torch
import torch.distributed as dist

from maas_ray.checkpoint.catalog import list_checkpoints, open_checkpoint, read_saved
from maas_ray.checkpoint.index import read_index
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot
from maas_ray.checkpoint.saver import Saver
from maas_ray.checkpoint.team import saving_group
from maas_ray.data.dataset import Dataset, open_dataset
from maas_ray.data.opening import open_rows
from maas_ray.errors import MaasError
from maas_ray.store.manifest import Committed
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train import group
from maas_ray.train.assemble import build_batches, build_loader, build_plan, build_trainee
from maas_ray.train.board import TIMEOUT_S
from maas_ray.train.figures import figures_at
from maas_ray.train.finite import refuse_not_finite
from maas_ray.train.journal import Journal
from maas_ray.train.loop import Plan, Trainee, fit, settle
from maas_ray.train.pace import Pace
from maas_ray.train.parallel import place_rank, refuse_far_groups
from maas_ray.train.profile import Profiler
from maas_ray.train.progress import Progress
from maas_ray.train.rates import Rates
from maas_ray.train.runs import checkpoints_prefix, run_prefix
from maas_ray.train.scorer import Scorer
from maas_ray.train.spec import TrainSpec
from maas_ray.train.state import MODEL, buffers_of, restore, tensors_of

RANDOM = "seed-position"
"""How random numbers are made, for whoever reads a checkpoint: from (seed, position of the sample); see train/dropout.py."""


def train_rank(spec: TrainSpec, data_digest: str, board: Any, device: torch.device) -> None:
    """Trains this process's share; the process group, if there is one, is the default one of torch.distributed.

    Ray starts the group again after any error, so one that would come again is put on the board and ends the run.

    Args:
        spec: the run, with an absolute store.
        data_digest: the prepared data set.
        board: an actor of `train/board.py`.
        device: where this rank computes.
    """
    if ray.get(board.failure.remote(), timeout=TIMEOUT_S) is not None:
        return  # the last attempt failed for good: end without an error, so that Ray does not try once more
    rank = dist.get_rank() if dist.is_initialized() else 0
    timeout_s = spec.workers.timeout_s
    pace = Pace(
        lambda beat: ray.get(board.beat.remote(beat), timeout=timeout_s),
        group.attempt(),
        rank,
        notice=group.notice,
        patience_s=timeout_s,
    )
    has_left = False
    try:
        has_left = not _train(spec, data_digest, board, device, pace)
    except MaasError as error:
        if not error.retryable:
            ray.get(board.fail.remote(error), timeout=TIMEOUT_S)
        raise
    finally:
        pace.close(has_left=has_left)


def _train(spec: TrainSpec, data_digest: str, board: Any, device: torch.device, pace: Pace) -> bool:
    """Returns whether the run is done: False if this rank left early, everything committed."""
    torch.set_num_threads(spec.workers.cpus)
    torch.use_deterministic_algorithms(spec.deterministic)
    store = open_store(spec.storage)
    dataset = open_dataset(store, data_digest)
    num_rows = dataset.num_rows["train"]
    world = dist.get_world_size() if dist.is_initialized() else 1
    place = place_rank(spec.layout.resolve(world), device.type)
    if place.mesh is not None:
        group.bound_waits(place.mesh, spec.workers.timeout_s)
    if not spec.layout.tp_across_nodes:
        refuse_far_groups(place.layout, ray.get_runtime_context().get_node_id(), device)
    trainee = build_trainee(spec, dataset.features, num_rows, place, device)
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, place)
    settle(plan, trainee, loader)
    first_step, history = _restore(store, spec, trainee)
    pace.committed(first_step)
    pace.begin(first_step)
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    journal = Journal(store, spec.run, first_step, history) if is_first else None

    def commit(committed: Committed) -> None:
        pace.committed(int(committed.meta["step"]))
        if journal is not None:
            journal.publish()

    saver = Saver(
        store,
        checkpoints_prefix(spec.run),
        group=saving_group(spec.checkpoint.timeout_s),
        timeout_s=spec.checkpoint.timeout_s,
        keep=spec.checkpoint.keep(),
        on_commit=commit,
    )

    rates = Rates(spec, dataset.features, device, world)

    def report(progress: Progress) -> None:
        progress = replace(progress, workers=world)
        if journal is not None:
            progress = rates.added_to(progress)
            journal.write(progress)
            board.put.remote(progress)

    def checkpoint(done: int) -> None:
        tensors = tensors_of(trainee)
        refuse_not_finite(tensors, done, device, buffers_of(trainee))
        history = journal.history if journal is not None else []
        saver.save(
            Snapshot(
                step=done,
                cursor=min(done * plan.global_size, plan.stop),
                tensors=tensors,
                meta={
                    "layout": str(place.layout),
                    "metrics": figures_at(history, done),
                    "random": RANDOM,
                    "seed": spec.seed,
                },
                history=history,
            )
        )

    profiler = _profiler(spec, store)
    try:
        with build_batches(spec, plan, loader, first_step, device) as batches:
            is_done = fit(
                plan,
                trainee,
                batches,
                first_step,
                report=report,
                checkpoint=checkpoint,
                validate=_validator(spec, plan, dataset, trainee, report),
                stop=_stop(spec, journal, device),
                leaves=pace.is_stop,
                begin=profiler.begin if profiler is not None else None,
            )
        saver.wait(is_strict=True)  # the last state has to be there before anybody leaves
        return is_done
    finally:
        saver.close()
        if profiler is not None:
            profiler.close()
        if journal is not None:
            journal.close()


def _profiler(spec: TrainSpec, store: ObstoreStore) -> Profiler | None:
    if spec.throughput.profile is None:
        return None
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Profiler(
        spec.throughput.profile, rank, lambda name, trace: store.put(f"{run_prefix(spec.run)}/profile/{name}", trace)
    )


def _restore(store: ObstoreStore, spec: TrainSpec, trainee: Trainee) -> tuple[int, list[dict[str, Any]]]:
    """Loads the newest committed state, if there is one; returns the steps done and the losses logged.

    Rank 0 says which one: the listings of two ranks may differ by a commit of an attempt that is ending.
    """
    prefix = checkpoints_prefix(spec.run)
    newest = torch.tensor([(list_checkpoints(store, prefix) or [0])[-1]], device=trainee.device)
    if dist.is_initialized():
        dist.broadcast(newest, src=0)
    if not int(newest):
        if spec.init is not None:
            _begin(store, spec, trainee)
        return 0, []
    committed = open_checkpoint(store, prefix, int(newest))
    saved = read_saved(committed)
    restore(trainee, saved.step, read_index(committed), lambda tensors: load_into(committed, tensors))
    return saved.step, saved.history


def _begin(store: ObstoreStore, spec: TrainSpec, trainee: Trainee) -> None:
    from maas_ray.train.warm_start import open_start  # late: few runs need it

    if spec.init is None:
        return
    start = open_start(spec.init, store, spec.storage)
    weights = {
        name.removeprefix(MODEL): tensor for name, tensor in tensors_of(trainee).items() if name.startswith(MODEL)
    }
    start.check(spec.model, weights)
    start.load(weights)
    if trainee.ema is not None:
        trainee.ema.update(0)


def _stop(spec: TrainSpec, journal: Journal | None, device: torch.device) -> Callable[[bool], bool] | None:
    """Rank 0 has the history and decides; the others hear of it."""
    stopper = spec.stopper()
    if stopper is None:
        return None

    def stop(is_validated: bool) -> bool:
        if stopper.needs_validation and not is_validated:
            return False
        ends = journal is not None and stopper.follow(journal.history) is not None
        decided = torch.tensor([ends], dtype=torch.int32, device=device)
        if dist.is_initialized():
            dist.broadcast(decided, src=0)
        return bool(decided)

    return stop


def _validator(
    spec: TrainSpec, plan: Plan, dataset: Dataset, trainee: Trainee, report: Callable[[Progress], None]
) -> Callable[[int], None] | None:
    if not dataset.num_rows.get("validation"):
        return None
    place = trainee.place
    rows = open_rows(dataset, "validation", seed=spec.seed)
    model = Scorer(trainee, plan, spec.batch.accumulation)

    def validate(done: int) -> None:
        from maas_ray.train.evaluate import evaluate_rows  # late: torchmetrics would take 3 s before the first step

        with trainee.ema.applied() if trainee.ema is not None else nullcontext():
            metrics = evaluate_rows(
                model,
                rows,
                task=dataset.features.task,
                num_classes=dataset.features.num_outputs,
                loss=trainee.loss,
                device=trainee.device,
                rank=place.dp,
                world=place.layout.dp,
            )
        report(Progress(done, plan.total_steps, plan.epoch(done), metrics=metrics))

    return validate
