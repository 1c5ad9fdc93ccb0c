"""The spec of a training run: data, model, objective, steps, workers and storage."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maas_ray.checkpoint.retention import Keep
from maas_ray.data.spec.augmentation import AugmentationSpec
from maas_ray.data.spec.data import DataSpec
from maas_ray.display import masked
from maas_ray.models.classical import parse_classical
from maas_ray.models.spec import ModelSpec
from maas_ray.spec import Spec
from maas_ray.store.objects import StorageSpec
from maas_ray.train.spec.callbacks import CallbackSpec
from maas_ray.train.spec.classical import refuse_unused
from maas_ray.train.spec.early_stopping import EarlyStoppingSpec, Stopper
from maas_ray.train.spec.init import InitSpec
from maas_ray.train.spec.length import DEFAULT_EPOCHS, ExtensionSpec, Unit, position_of
from maas_ray.train.spec.metrics import MetricSpec, refuse_labels
from maas_ray.train.spec.optim import EmaSpec, ObjectiveSpec, OptimizerSpec, loss_name
from maas_ray.train.spec.parallelism import MeshLayout, ParallelismSpec
from maas_ray.train.spec.performance import PerformanceSpec
from maas_ray.train.spec.plateau import Plateau
from maas_ray.train.spec.schedule import ScheduleSpec
from maas_ray.train.spec.tensorboard import TensorboardSpec


class GlobalBatchSpec(Spec):
    """Number of samples of one optimizer step, independent of the number of workers."""

    global_size: PositiveInt = 64
    """Samples per optimizer step over all workers; the same for any number of workers, and so is the result."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches into which each worker splits its share to save memory; the gradient is that of the whole batch."""


class WorkersSpec(Spec):
    """The training processes and their resources: either `count` workers, or from `min` to `max`."""

    count: PositiveInt = 1
    """Number of workers; by default each is a replica of the model with its own rows, see `parallelism`."""
    min: PositiveInt | None = None
    """Smallest number of workers if the number follows the cluster's resources; needs `max`."""
    max: PositiveInt | None = None
    """Largest number of workers. Numbers in between are rounded down to complete replicas of the model; the samples of
    a step are the same with any number."""
    cpus: PositiveInt = 1
    """CPUs per worker; also the number of compute threads."""
    gpus: NonNegativeInt = 0
    """GPUs per worker, 0 or 1; the backend is NCCL with 1, else gloo."""
    max_restarts: NonNegativeInt = 3
    """Largest number of consecutive restarts from the last committed checkpoint after the loss of a worker or its node;
    a new checkpoint resets the count. Restarts after a drain notice and for more workers do not count."""
    timeout_s: PositiveFloat = 45.0
    """Timeout of a rank that waits for other ranks. The attempt then ends and reports the missing ranks; including the
    detection and the end of hanging processes this takes a minute."""
    placement_timeout_s: PositiveFloat = 60.0
    """Timeout for free resources, at the start and after a loss. The run then ends; resume it later."""
    scale_up_interval_s: PositiveFloat = 30.0
    """Time between checks for resources for more workers, up to `max`. Each scale-up takes a checkpoint and a restart;
    the interval should be longer than both."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gpus > 1:
            raise ValueError("workers.gpus must be 0 or 1; raise workers.count instead")
        if (self.min is None) != (self.max is None):
            raise ValueError("give workers.min and workers.max together, or neither")
        if self.min is not None and self.max is not None:
            if self.count != 1:
                raise ValueError("give either workers.count, or workers.min and workers.max")
            if self.min > self.max:
                raise ValueError(f"workers.min {self.min} is larger than workers.max {self.max}")
        return self

    @property
    def least(self) -> int:
        """Smallest number of workers."""
        return self.min or self.count

    @property
    def most(self) -> int:
        """Largest number of workers."""
        return self.max or self.count


class ValidationSpec(Spec):
    """How the validation split is evaluated."""

    mode: Literal["sync", "async"] = "sync"
    """`sync`: the workers validate between steps. `async`: a task validates each committed checkpoint while the workers
    continue to train; its metrics are available at the next checkpoint."""
    cpus: PositiveInt = 1
    """CPUs of the async task; also the number of its compute threads."""
    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of the async task."""
    timeout_s: PositiveFloat = 600.0
    """Timeout of an async validation; training then continues without its metrics."""

    @property
    def is_async(self) -> bool:
        """Whether validation is asynchronous."""
        return self.mode == "async"


class CheckpointSpec(Spec):
    """When training state is committed, and which checkpoints are kept: those that at least one rule keeps."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; None: one at the end of every epoch. The last step always has one."""
    keep_last: PositiveInt = 3
    """Number of newest committed checkpoints to keep; the newest one and pinned ones are never removed."""
    keep_every_steps: PositiveInt | None = None
    """Also keep checkpoints of steps that are multiples of this number."""
    keep_best: NonNegativeInt = 0
    """Also keep this number of the best checkpoints by `metric`; every validated state is then committed."""
    metric: str = "validation_loss"
    """`loss`, or a metric of the validation split, such as `validation_accuracy`."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    use: Literal["newest", "best"] = "newest"
    """Default checkpoint of `evaluate` and `publish`; `best` needs `keep_best`."""
    timeout_s: PositiveFloat = 120.0
    """Timeout of a save. It then fails on all workers, and training continues until the next save."""

    @model_validator(mode="after")
    def _keeps_what_it_uses(self) -> Self:
        if self.use == "best" and not self.keep_best:
            raise ValueError(
                "use: best needs keep_best of at least 1, since the best checkpoint may be removed otherwise"
            )
        return self

    def keep(self) -> Keep:
        """The retention rules."""
        return Keep(
            last=self.keep_last,
            best=self.keep_best,
            metric=self.metric,
            mode=self.mode,
            every_steps=self.keep_every_steps,
        )


class TrainSpec(Spec):
    """A training run."""

    run: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    """Id of the run; an existing run is refused unless it is resumed."""
    model: ModelSpec
    data: DataSpec
    augmentation: AugmentationSpec | None = Field(default=None, exclude_if=lambda value: value is None)
    """Random changes of the training images; None: no changes."""
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    init: InitSpec | None = None
    """Initial weights; None: random weights from `seed`."""
    ema: EmaSpec | None = None
    """An exponential moving average of the weights; None: no average."""
    batch: GlobalBatchSpec = GlobalBatchSpec()
    epochs: PositiveInt | None = None
    """Number of passes over the training split; 10 unless `steps` is given."""
    steps: PositiveInt | None = None
    """Number of optimizer steps, instead of `epochs`."""
    extensions: tuple[ExtensionSpec, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Extensions of a run beyond its original length, oldest first; written by `--extend`, a new run has none."""
    early_stopping: EarlyStoppingSpec | None = None
    """Ends the run early when a metric no longer improves; None: the run ends at its last step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the forward pass under autocast, or under FSDP2's mixed-precision policy if sharded; weights,
    gradients and optimizer state remain float32."""
    max_grad_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient, for clipping; None: no clipping."""
    seed: NonNegativeInt = 0
    """Seed of initial weights, sample order and dropout."""
    deterministic: bool = False
    """Use deterministic GPU kernels (slower). On CPUs a run is bitwise reproducible in any case."""
    log_every: PositiveInt = 10
    """Optimizer steps between logged losses."""
    validate_every: PositiveInt | None = None
    """Optimizer steps between validations; None: one at the end of every epoch. The last step always has one."""
    validation: ValidationSpec = ValidationSpec()
    metrics: tuple[MetricSpec, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Further metrics of held-out data, in addition to those of the task."""
    tensorboard: TensorboardSpec = TensorboardSpec()
    callbacks: tuple[CallbackSpec, ...] = Field(default=(), exclude_if=lambda value: not value)
    """Code that follows the run: logged steps, validations, checkpoints and the end."""
    export_check: Literal["refuse", "warn", "off"] = Field(default="refuse", exclude_if=lambda value: value == "refuse")
    """Before the first step, the untrained model is exported as `publish` does it. `refuse`: a run whose model cannot be
    published is not started; `warn`: it is started with a warning; `off`: nothing is checked."""
    workers: WorkersSpec = WorkersSpec()
    parallelism: ParallelismSpec = ParallelismSpec()
    performance: PerformanceSpec = PerformanceSpec()
    storage: StorageSpec = Field(default_factory=StorageSpec)
    checkpoint: CheckpointSpec = CheckpointSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model.is_classical:
            refuse_unused(self, self.model.name)
            parse_classical(self.model.name, self.model.params, self.data.task)
        if self.validation.is_async and self.validate_every is not None:
            raise ValueError(
                "validation.mode async validates every checkpoint; remove validate_every and set checkpoint.every_steps"
            )
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        for layout in self.layouts():
            if self.batch.global_size < layout.dp:
                raise ValueError(
                    f"batch.global_size {self.batch.global_size} is smaller than the {layout.dp} data-parallel ranks "
                    f"of {layout.world} workers, some of which would have no samples; raise it to at least {layout.dp}"
                )
        if self.augmentation is not None and self.augmentation.mixup:
            self._check_mixup()
        loss_name(self.objective, self.data.task)  # refuses an invalid loss for the task
        refuse_labels(self.metrics, self.data.task)
        if self.objective.auxiliary and any(layout.pp > 1 for layout in self.layouts()):
            raise ValueError(
                "objective.auxiliary: stages of a pipeline pass on one tensor, so that auxiliary losses of earlier stages "
                "would be lost; use a layout without pp"
            )
        return self

    def _check_mixup(self) -> None:
        """Rejects what has no meaning for a target between two classes."""
        name = self.objective.loss
        if self.objective.is_imported or name == "focal":
            raise ValueError(
                f"augmentation.mixup mixes targets, which objective.loss {name} does not support; remove it"
            )
        if self.objective.class_weights is not None:
            raise ValueError(
                "augmentation.mixup mixes classes, so that objective.class_weights has no meaning; remove one"
            )

    def stopper(self) -> Stopper | None:
        """The early-stopping rule of the run, or None."""
        early, by = self.early_stopping, self.checkpoint
        if early is None:
            return None
        return Stopper(early.metric or by.metric, early.mode or by.mode, early.patience, early.min_delta)

    def plateau(self) -> Plateau | None:
        """The rule that lowers the learning rate by a validation metric, or None."""
        by, schedule = self.checkpoint, self.schedule
        if schedule.name != "plateau":
            return None
        return Plateau(
            schedule.metric or by.metric,
            schedule.mode or by.mode,
            factor=schedule.factor,
            patience=schedule.patience,
            min_delta=schedule.min_delta,
            lowest=schedule.min_lr_ratio,
        )

    def followed_metrics(self) -> list[tuple[str, str, str]]:
        """The metrics by which the run decides: field of the spec, name, and direction of improvement."""
        by, early, schedule = self.checkpoint, self.early_stopping, self.schedule
        found: list[tuple[str, str, str]] = [("checkpoint", by.metric, by.mode)] if by.keep_best else []
        if early is not None:
            found.append(("early_stopping", early.metric or by.metric, early.mode or by.mode))
        if schedule.name == "plateau":
            found.append(("schedule", schedule.metric or by.metric, schedule.mode or by.mode))
        return found

    def layouts(self) -> list[MeshLayout]:
        """The layout of each valid number of workers, smallest first.

        Raises:
            SpecError: no number of workers is valid.
        """
        if self.workers.max is None:
            return [self.parallelism.resolve(self.workers.count)]
        return [
            self.parallelism.resolve(size) for size in self.parallelism.sizes(self.workers.least, self.workers.most)
        ]

    def stop_position(self, num_rows: int) -> int:
        """Global sample position at the end of the run: epochs x rows, or steps x global batch.

        Args:
            num_rows: rows of the training split.
        """
        if self.steps is not None:
            return self.position(self.steps)
        return (self.epochs or DEFAULT_EPOCHS) * num_rows

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run; the last batch may be smaller than the others."""
        last = self.extensions[-1].step if self.extensions else 0
        return last - (self.position(last) - self.stop_position(num_rows)) // self.batch.global_size

    def position(self, step: int) -> int:
        """Global sample position at which a step begins, from 0."""
        return position_of(step, self.batch.global_size, self.extensions)

    @property
    def unit(self) -> Unit:
        """The unit of the run's length."""
        return "epochs" if self.steps is None else "steps"

    def extended(self, extension: ExtensionSpec) -> Self:
        """The spec with a new length from an extension on."""
        length = {"epochs": extension.epochs, "steps": extension.steps}
        return self.model_copy(update={**length, "extensions": (*self.extensions, extension)})

    def same_training(self, other: "TrainSpec") -> list[str]:
        """Names of the fields that make `other` another training; empty if it can resume this run's checkpoints.

        Storage, intervals of checkpoints, validation and logs, early stopping, workers, parallelism, performance and
        the expansion limit of files can change.
        """
        free = {"storage", "workers", "parallelism", "performance", "checkpoint", "log_every", "validate_every"}
        free |= {"early_stopping", "validation", "tensorboard", "callbacks", "metrics", "extensions", "export_check"}
        mine, theirs = (masked(one.model_dump(mode="json")) for one in (self, other))  # as in stored runs
        for fields in (mine, theirs):
            del fields["batch"]["accumulation_steps"]  # the split of a share does not change the gradient
            del fields["optimizer"]["implementation"]  # the kernels of the same update
            fields["data"].pop("max_expansion", None)  # a limit that prepared data no longer needs
        return sorted(name for name in {*mine, *theirs} - free if mine.get(name) != theirs.get(name))
