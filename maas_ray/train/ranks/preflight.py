"""Checks model, layout and optimizer of a spec against the data, on rank 0 before the run's record is created.

Runs on a rank and not in the driver, because it needs torch, whose import takes 2 s and which a rank has imported.
"""

from maas_ray.data.stored.dataset import Dataset
from maas_ray.display import get_logger
from maas_ray.models.build import example_rows
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.callbacks.load import check_callbacks
from maas_ray.train.loop.assemble import build_or_defer
from maas_ray.train.loop.optimizer import build_optimizer, build_schedule
from maas_ray.train.modules.batch_statistics import refuse_lone_row
from maas_ray.train.modules.unused_parameters import unused_weights
from maas_ray.train.parallel.mesh import refuse_unfit
from maas_ray.train.parallel.pipeline import refuse_microbatches
from maas_ray.train.spec.train import TrainSpec

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
    has_data = not any(weight.is_meta for weight in net.parameters())
    if has_data and (unused := unused_weights(net, example)):
        log.warning("the model's logits do not depend on %s, which will not change", ", ".join(unused))
    if has_data:
        refuse_lone_row(net, example, spec.batch.global_size, spec.stop_position(dataset.num_rows["train"]))
    if spec.init is not None:
        from maas_ray.train.state.warm_start import open_start  # late: few runs need it

        open_start(spec.init, store, spec.storage).check(spec.model, net.state_dict())
    for layout in layouts:
        if layout.dp_replicate == layout.world:
            continue  # replicas support any model
        refuse_unfit(net, layout, spec.parallelism.tp_plan, pp_split=spec.parallelism.pp_split, example=example)
        refuse_microbatches(layout, spec.batch.accumulation_steps)
    kernels = {"implementation": "loop"} if deferred is not None else {}  # others reject tensors without data
    optimizer = build_optimizer(spec.optimizer.model_copy(update=kernels), net)
    build_schedule(spec.schedule, optimizer, spec.total_steps(dataset.num_rows["train"]))
