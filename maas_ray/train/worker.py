"""One rank of a run: builds its part, loads the newest committed state, trains to the end. Knows no ray.train.

Kept apart from train/run.py so that the processes that train import only what training needs.
"""

from collections.abc import Callable
from typing import Any

import ray
import torch
import torch.distributed as dist

from maas_ray.data.dataset import Dataset, open_dataset
from maas_ray.data.opening import open_rows
from maas_ray.errors import MaasError
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.assemble import build_loader, build_plan, build_trainee
from maas_ray.train.board import TIMEOUT_S
from maas_ray.train.checkpoint import TrainingState, list_checkpoints, load_checkpoint, retain, save_checkpoint
from maas_ray.train.evaluate import evaluate_rows
from maas_ray.train.journal import Journal
from maas_ray.train.loop import Plan, Trainee, fit, settle
from maas_ray.train.parallel import place_rank
from maas_ray.train.progress import Progress
from maas_ray.train.raw_model import RawModel
from maas_ray.train.spec import TrainSpec


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
    try:
        _train(spec, data_digest, board, device)
    except MaasError as error:
        if not error.retryable:
            ray.get(board.fail.remote(error), timeout=TIMEOUT_S)
        raise


def _train(spec: TrainSpec, data_digest: str, board: Any, device: torch.device) -> None:
    torch.set_num_threads(spec.workers.cpus)
    torch.use_deterministic_algorithms(spec.deterministic)
    store = open_store(spec.storage)
    dataset = open_dataset(store, data_digest)
    num_rows = dataset.num_rows["train"]
    place = place_rank(spec.layout.resolve(spec.workers.count), device.type)
    trainee = build_trainee(spec, dataset.features, num_rows, place, device)
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, place)
    settle(plan, trainee, loader)
    rank = dist.get_rank() if dist.is_initialized() else 0
    first_step, history = _restore(store, spec, trainee)
    journal = Journal(store, spec.run, first_step, history) if rank == 0 else None

    def report(progress: Progress) -> None:
        if journal is not None:
            journal.write(progress)
            board.put.remote(progress)

    def checkpoint(done: int) -> None:
        if journal is not None:
            save_checkpoint(store, spec.run, _state(spec, plan, trainee, done, journal.history))
            retain(store, spec.run, spec.checkpoint.keep_last)
            journal.publish()

    try:
        fit(
            plan,
            trainee,
            loader,
            first_step,
            report=report,
            checkpoint=checkpoint,
            validate=_validator(spec, dataset, trainee),
        )
        if dist.is_initialized():
            dist.barrier()  # the others leave only when rank 0 has committed the last state
    finally:
        if journal is not None:
            journal.close()


def _restore(store: ObstoreStore, spec: TrainSpec, trainee: Trainee) -> tuple[int, list[dict[str, Any]]]:
    """Loads the newest committed state, if there is one; returns the steps done and the losses logged."""
    if not list_checkpoints(store, spec.run):
        return 0, []
    state = load_checkpoint(store, spec.run)
    trainee.parts[0].load_state_dict(dict(state.model))
    trainee.optimizer.load_state_dict(dict(state.optimizer))
    trainee.schedule.load_state_dict(dict(state.schedule))
    return state.step, state.history


def _state(spec: TrainSpec, plan: Plan, trainee: Trainee, done: int, history: list[dict[str, Any]]) -> TrainingState:
    return TrainingState(
        step=done,
        cursor=min(done * plan.global_size, plan.stop),
        model=trainee.parts[0].state_dict(),
        optimizer=trainee.optimizer.state_dict(),
        schedule=trainee.schedule.state_dict(),
        rng={"scheme": "seed-step-rank", "seed": spec.seed},
        history=history,
    )


def _validator(spec: TrainSpec, dataset: Dataset, trainee: Trainee) -> Callable[[], dict[str, float]] | None:
    if not dataset.num_rows.get("validation"):
        return None
    place = trainee.place
    rows = open_rows(dataset, "validation", seed=spec.seed)
    model = RawModel(dataset.features, trainee.parts[0]).to(trainee.device)
    return lambda: evaluate_rows(
        model,
        rows,
        task=dataset.features.task,
        num_classes=dataset.features.num_outputs,
        loss=trainee.loss,
        device=trainee.device,
        rank=place.dp,
        world=place.layout.dp,
    )
