"""Checks model, layout and optimizer of a spec against the data, on rank 0 before the run's record is created.

Runs on a rank and not in the driver, because it needs torch, whose import takes 2 s and which a rank has imported.
"""

from contextlib import suppress

import numpy as np
import torch
from torch import Tensor, nn

from maas_ray.data.loading.open import open_rows
from maas_ray.data.loading.preprocess import Preprocess
from maas_ray.data.spec.features import Features, TargetScaling
from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.display import get_logger
from maas_ray.errors import NotFound
from maas_ray.models.build import example_rows, is_imported
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.callbacks.load import check_callbacks
from maas_ray.train.custom.loss import CustomLoss, check_loss
from maas_ray.train.loop.assemble import build_net, build_or_defer
from maas_ray.train.loop.auxiliary import split_output
from maas_ray.train.loop.loss import build_loss
from maas_ray.train.modules.batch_statistics import refuse_lone_row
from maas_ray.train.modules.input_range import extreme_rows, refuse_out_of_range, refuse_rounded_codes
from maas_ray.train.modules.probabilities import normalized_output
from maas_ray.train.modules.unused_parameters import unused_weights
from maas_ray.train.optim.check import check_optimizer
from maas_ray.train.optim.optimizer import build_optimizer
from maas_ray.train.optim.parameter_groups import freeze_weights
from maas_ray.train.optim.schedule import build_schedule, check_schedule
from maas_ray.train.parallel.distribute import refuse_unfit
from maas_ray.train.parallel.pipeline import refuse_microbatches
from maas_ray.train.records.runs import Runs
from maas_ray.train.spec.init import InitSpec
from maas_ray.train.spec.metrics import VALIDATION
from maas_ray.train.spec.train import TrainSpec

_EXAMPLE_ROWS = 8
_MAX_BUILT_HERE = 1 << 27
"""Largest number of weights of a model that is built for a check although each rank builds only its part."""

log = get_logger(__name__)


def check_run(spec: TrainSpec, dataset: Dataset, store: ObstoreStore) -> None:
    """Builds everything once, for each valid number of workers.

    Raises:
        ModelError, SpecError: a mismatch, with a fix.
    """
    check_callbacks(spec.callbacks)
    features = dataset.features
    layouts, example = spec.layouts(), example_rows(features.row)
    net, deferred = build_or_defer(spec, features, layouts)
    freeze_weights(spec.optimizer, net)
    has_data = not any(weight.is_meta for weight in net.parameters())
    _check_codes(spec, features, net)
    if has_data and (unused := unused_weights(net, example)):
        log.warning("the model's logits do not depend on %s, which will not change", ", ".join(unused))
    if has_data and not spec.objective.is_imported:
        _warn_of_probabilities(spec, dataset, net)
    if has_data:
        refuse_lone_row(net, example, spec.batch.global_size, spec.stop_position(dataset.num_rows["train"]))
    if spec.init is not None:
        from maas_ray.train.state.warm_start import open_start  # late: few runs need it

        open_start(spec.init, store, spec.storage).check(spec.model, net.state_dict(), is_whole=True)
        _warn_of_units(spec.init, features, store)
    for layout in layouts:
        if layout.dp_replicate == layout.world:
            continue  # replicas support any model
        refuse_unfit(net, layout, spec.parallelism.tp_plan, pp_split=spec.parallelism.pp_split, example=example)
        refuse_microbatches(layout, spec.batch.accumulation_steps)
    _check_imported(spec, dataset, net if has_data else None)
    kernels = {"implementation": "loop"} if deferred is not None else {}  # others reject tensors without data
    optimizer = build_optimizer(spec.optimizer.model_copy(update=kernels), net)
    total_steps = spec.total_steps(dataset.num_rows["train"])
    build_schedule(spec.schedule, optimizer, total_steps)
    check_schedule(spec.schedule, total_steps)


def _warn_of_probabilities(spec: TrainSpec, dataset: Dataset, net: nn.Module) -> None:
    """Warns if the network computes probabilities, of the first training rows, where the loss needs logits."""
    if dataset.features.task == "regression":
        return
    rows = open_rows(dataset, "train", seed=spec.seed)
    ids = np.arange(min(len(rows), _EXAMPLE_ROWS), dtype=np.int64)
    encoded = Preprocess(dataset.features)(*rows.take(ids, ids).columns)
    if ending := normalized_output(net, lambda model: model(encoded), dataset.features.num_outputs):
        log.warning(
            "the model ends in %s, which the loss applies itself; return logits instead: twice, it slows training down and "
            "keeps the probabilities from 0 and 1",
            ending,
        )


def _warn_of_units(init: InitSpec, features: Features, store: ObstoreStore) -> None:
    """Warns if the initial weights predict numbers on another scale than that of this run."""
    if init.run is None or features.task != "regression":
        return
    with suppress(NotFound):  # the weights are there; their data may have been removed
        theirs = open_dataset(store, Runs(store).get(init.run).data_digest).features.target_scaling
        if theirs != features.target_scaling:
            log.warning(
                "run %s learned its target as %s, this run as %s: the first predictions are in other units, and its last "
                "layer must be learned again",
                init.run,
                _scale_of(theirs),
                _scale_of(features.target_scaling),
            )


def _scale_of(scaling: TargetScaling | None) -> str:
    return "it is" if scaling is None else f"(y - {scaling.shift[0]:.4g}) / {scaling.scale[0]:.4g}"


def _check_codes(spec: TrainSpec, features: Features, net: nn.Module) -> None:
    """Runs a user's module on the extreme codes of the data; one without data is built here, unless it is large."""
    if not is_imported(spec.model):
        return
    if spec.precision == "bf16" and any(layout.dp_shard > 1 for layout in spec.layouts()):
        refuse_rounded_codes(features.row)
    if extreme_rows(features.row) is None:
        return
    if any(weight.is_meta for weight in net.parameters()):
        if sum(weight.numel() for weight in net.parameters()) > _MAX_BUILT_HERE:
            return
        net = build_net(spec, features)
    refuse_out_of_range(net, features.row)


def _check_imported(spec: TrainSpec, dataset: Dataset, net: nn.Module | None) -> None:
    """Calls what the spec names by import path with the first rows of the data; `net` is None if it has no data."""
    if spec.optimizer.is_imported and net is not None:
        check_optimizer(spec.optimizer, net)
    if net is not None and spec.objective.auxiliary:
        split_output(net.train()(example_rows(dataset.features.row)), spec.objective.auxiliary)
    if not (spec.objective.is_imported or spec.metrics):
        return
    logits, target = _example_logits(dataset, spec.seed)
    loss = build_loss(spec.objective, dataset.features.task)
    if isinstance(loss, CustomLoss):
        check_loss(loss, logits, target)
    if spec.metrics:
        from maas_ray.train.custom.metrics import CustomMetrics, check_metrics  # late: imports torchmetrics
        from maas_ray.train.evaluation.evaluate import comparable

        metrics = CustomMetrics(spec.metrics)
        check_metrics(metrics, *comparable(dataset.features.task, logits, target))
        for field, metric, mode in spec.followed_metrics():
            metrics.refuse_direction(metric.removeprefix(VALIDATION), mode, field)


def _example_logits(dataset: Dataset, seed: int) -> tuple[Tensor, Tensor]:
    """Random logits for the first training rows, and the target of these rows."""
    rows, features = open_rows(dataset, "train", seed=seed), dataset.features
    ids = np.arange(min(len(rows), _EXAMPLE_ROWS), dtype=np.int64)
    target = rows.take(ids, ids).target
    shape = (*target.shape, features.num_outputs) if features.is_per_token else (len(target), features.num_outputs)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)), target
