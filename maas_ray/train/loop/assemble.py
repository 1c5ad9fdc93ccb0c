"""Builds a rank's TrainState, plan and loader from the spec. Independent of checkpoints and Ray."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import nn

from maas_ray.data.loading.augment import AugmentedRows
from maas_ray.data.loading.loader import Loader
from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.prefetch import Prefetcher
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import Dataset
from maas_ray.display import get_logger
from maas_ray.errors import SpecError
from maas_ray.models.build import build_model, example_rows, import_model, is_read
from maas_ray.train.loop.auxiliary import AuxiliaryLosses
from maas_ray.train.loop.loss import build_loss, num_valid
from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.row_weights import RowWeights
from maas_ray.train.loop.step import Batches
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.modules.activation_checkpoint import recompute_blocks
from maas_ray.train.modules.dropout import replace_dropout
from maas_ray.train.modules.unused_parameters import unused_weights
from maas_ray.train.optim.average import AveragingOptimizer, OptimizerAverage
from maas_ray.train.optim.check import check_split_state
from maas_ray.train.optim.ema import Ema
from maas_ray.train.optim.optimizer import build_optimizer, hidden_matrices
from maas_ray.train.optim.parameter_groups import freeze_weights
from maas_ray.train.optim.schedule import build_schedule
from maas_ray.train.parallel.distribute import distribute
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.parallel.pipeline import Pipeline
from maas_ray.train.spec.class_weights import resolve_weights
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec

if TYPE_CHECKING:
    from maas_ray.train.modules.deferred_init import Deferred

log = get_logger(__name__)

GPU_DEPTH = 2
"""Number of steps that are read ahead on a GPU, where the CPUs have time."""


def build_net(spec: TrainSpec, features: Features) -> nn.Module:
    """Builds the network with its initial weights, which are the same in every process and every attempt."""
    torch.manual_seed(spec.seed)
    return build_model(spec.model, features.row, features.num_outputs, per_token=features.is_per_token)


def build_or_defer(
    spec: TrainSpec, features: Features, layouts: Iterable[MeshLayout], dtype: torch.dtype = torch.float32
) -> "tuple[nn.Module, Deferred | None]":
    """Builds the network; if one of the layouts splits it, without data, together with its deferred initialization.

    A network without support for that is built directly, which needs the memory of all of it on every rank.
    """

    def build() -> nn.Module:
        return build_net(spec, features).to(dtype)

    if not any(layout.cuts_model for layout in layouts):
        return build(), None
    from maas_ray.train.modules.deferred_init import Deferred  # late: replicas do not need it
    from maas_ray.train.modules.deferred_tape import CannotDefer

    try:
        if is_read(spec.model):
            raise CannotDefer("its weights are read from a folder")
        import_model(spec.model)
        deferred = Deferred(build, spec.seed)
        return deferred.net, deferred
    except CannotDefer as error:
        log.info("each rank holds the whole model during its build: %s", error)
    return build(), None


def build_train_state(
    spec: TrainSpec,
    features: Features,
    num_rows: int,
    coordinates: RankCoordinates,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    class_rows: Sequence[int] | None = None,
) -> TrainState:
    """Builds the training state of this rank.

    Args:
        spec: the run.
        features: features of the data.
        num_rows: number of rows of the training split.
        coordinates: coordinates of this rank.
        device: device of this rank.
        dtype: type of weights and activations; float64 for comparisons.
        class_rows: training rows of each class, for balanced weights; see `count_class_rows`.

    Raises:
        ModelError, SpecError: the model cannot be built or does not support the layout; contains the reason.
    """
    net, deferred = build_or_defer(spec, features, [coordinates.layout], dtype)
    freeze_weights(spec.optimizer, net)
    is_replicated = coordinates.layout.world > 1 and coordinates.layout.dp_replicate == coordinates.layout.world
    example = example_rows(features.row, dtype=dtype)
    has_unused = is_replicated and bool(unused_weights(net, example))
    replace_dropout(net)
    if spec.performance.compile:
        from maas_ray.train.modules.compile import compile_blocks  # late: few runs need it

        compile_blocks(net)
    recompute_blocks(net, spec.performance.activation_checkpointing)
    loss = build_loss(spec.objective, features.task, is_training=True)
    if isinstance(loss, nn.Module):
        loss.to(device, dtype)
    layout = coordinates.layout
    if spec.optimizer.is_imported and coordinates.mesh is not None and (layout.dp_shard > 1 or layout.tp > 1):
        check_split_state(spec.optimizer, coordinates.mesh)
    orthogonal = hidden_matrices(net) if spec.optimizer.name == "muon" else None
    parts = distribute(
        net,
        coordinates,
        device,
        plan=spec.parallelism.tp_plan,
        precision=spec.precision,
        unit_mib=spec.parallelism.shard_unit_mib,
        pp_split=spec.parallelism.pp_split,
        example=example,
        has_unused=has_unused,
    )
    if deferred is not None:
        deferred.fill(parts.bare, device)
    optimizer = build_optimizer(spec.optimizer, *parts.bare, orthogonal=orthogonal)
    pipeline = None
    if coordinates.mesh is not None and coordinates.layout.pp > 1:
        pipeline = Pipeline(
            parts.wrapped,
            coordinates.layout,
            rank=coordinates.pp,
            group=coordinates.mesh["pp"].get_group(),
            num_microbatches=spec.batch.accumulation_steps,
            loss=loss,
            seed=spec.seed,
            device=device,
        )
    return TrainState(
        parts=parts.bare,
        model=parts.wrapped[0],
        preprocess=Preprocess(features).to(device),
        loss=loss,
        optimizer=optimizer,
        schedule=build_schedule(spec.schedule, optimizer, spec.total_steps(num_rows)),
        device=device,
        coordinates=coordinates,
        num_valid=num_valid if features.is_per_token else None,
        row_weights=_row_weights(spec, features, class_rows, device),
        l1=spec.objective.l1,
        l2=spec.objective.l2,
        average=_average(spec, parts.bare, optimizer),
        pipeline=pipeline,
        auxiliary=AuxiliaryLosses(spec.objective.auxiliary, device) if spec.objective.auxiliary else None,
        dtype=dtype,
    )


def _average(
    spec: TrainSpec, parts: Sequence[nn.Module], optimizer: torch.optim.Optimizer
) -> Ema | OptimizerAverage | None:
    if isinstance(optimizer, AveragingOptimizer):
        if spec.ema is not None:
            raise SpecError(f"ema: {spec.optimizer.name} keeps an average of the weights by itself; remove ema")
        return OptimizerAverage(parts, optimizer)
    return Ema(parts, spec.ema.decay, spec.ema.start_step) if spec.ema is not None else None


def count_class_rows(spec: TrainSpec, dataset: Dataset) -> Sequence[int] | None:
    """Training rows of each class, if the weights of classes depend on them."""
    return dataset.count_classes().tolist() if spec.objective.class_weights == "balanced" else None


def _row_weights(
    spec: TrainSpec, features: Features, class_rows: Sequence[int] | None, device: torch.device
) -> RowWeights | None:
    of_class = resolve_weights(spec.objective.class_weights, features.labels or (), class_rows)
    return None if of_class is None and features.weight is None else RowWeights(of_class, device)


def build_plan(spec: TrainSpec, num_rows: int) -> LoopPlan:
    """The plan of a run on a training split of `num_rows` rows."""
    return LoopPlan(
        total_steps=spec.total_steps(num_rows),
        stop=spec.stop_position(num_rows),
        global_size=spec.batch.global_size,
        num_rows=num_rows,
        seed=spec.seed,
        log_every=spec.log_every,
        checkpoint_every=spec.checkpoint.every_steps,
        validate_every=spec.checkpoint.every_steps if spec.validation.is_async else spec.validate_every,
        max_grad_norm=spec.max_grad_norm,
        precision=spec.precision,
        extensions=spec.extensions,
        saves_validated=spec.checkpoint.keep_best > 0,
    )


def build_loader(spec: TrainSpec, dataset: Dataset, coordinates: RankCoordinates, min_rows: int = 1) -> Loader:
    """The loader of this rank's rows of each global batch; for `min_rows` see `Loader` and `TrainState.min_rows`."""
    rows = open_rows(dataset, "train", seed=spec.seed)
    if spec.augmentation is not None:
        rows = AugmentedRows(rows, spec.augmentation, dataset.features, spec.seed)
    return Loader.over(
        rows,
        seed=spec.seed,
        global_batch=spec.batch.global_size,
        rank=coordinates.dp,
        world=coordinates.layout.dp,
        accumulation_steps=spec.batch.accumulation_steps,
        min_rows=min_rows,
    )


def build_batches(
    spec: TrainSpec, plan: LoopPlan, loader: Loader, first_step: int, device: torch.device
) -> AbstractContextManager[Batches]:
    """Returns the loader, or one that reads ahead, depending on the spec."""
    depth = spec.performance.prefetch
    if depth is None:
        depth = GPU_DEPTH if device.type == "cuda" else 0
    if not depth:
        return nullcontext(loader)
    return Prefetcher(
        loader,
        cursor=plan.position(first_step),
        stop=plan.stop,
        stride=plan.global_size,
        depth=depth,
        pin=device.type == "cuda",
        timeout_s=spec.workers.timeout_s,
    )
