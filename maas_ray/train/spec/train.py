"""What a training run is: the one description from which data, model, objective, steps and storage follow."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maas_ray.checkpoint.retention import Keep
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
from maas_ray.train.spec.optim import EmaSpec, ObjectiveSpec, OptimizerSpec, ScheduleSpec, loss_name
from maas_ray.train.spec.parallelism import MeshLayout, ParallelismSpec
from maas_ray.train.spec.performance import PerformanceSpec
from maas_ray.train.spec.tensorboard import TensorboardSpec


class GlobalBatchSpec(Spec):
    """How many samples make one optimizer step, whatever the number of workers."""

    global_size: PositiveInt = 64
    """Samples per optimizer step over all workers; fixed, so that a run means the same on any number of workers."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches into which each worker cuts its share, to save memory; the gradient is that of the whole batch."""


class WorkersSpec(Spec):
    """The processes that train, and what each one needs. Either `count` of them, or from `min` to `max`."""

    count: PositiveInt = 1
    """Processes; by default each is a replica of the model with its own rows, see `parallelism`."""
    min: PositiveInt | None = None
    """Fewest processes with which training goes on, where their number follows what the cluster has; with `max`."""
    max: PositiveInt | None = None
    """Most processes. What is between is rounded down to whole replicas of the model; the batch of a step, and the
    samples in it, are the same with any number."""
    cpus: PositiveInt = 1
    """CPUs per worker; also the number of compute threads."""
    gpus: NonNegativeInt = 0
    """GPUs per worker, 0 or 1; with 1 the gradients go over NCCL, else over gloo."""
    max_restarts: NonNegativeInt = 3
    """Times in a row that the group is started again from the last committed checkpoint when a worker or its node is
    lost; a checkpoint committed in between begins the count anew. Leaving after a notice, and growing, cost none."""
    timeout_s: PositiveFloat = 45.0
    """Longest wait of a rank for another one. Then the attempt ends, naming who was missing; with the time to notice and
    to end what hangs, a minute."""
    placement_timeout_s: PositiveFloat = 60.0
    """Longest wait for room in the cluster, at the start and after a loss. Then the run ends; resume it later."""
    scale_up_interval_s: PositiveFloat = 30.0
    """Time between two looks for room for more workers, if there are fewer than `max`. Growing takes a checkpoint and a
    new start, so it should be rarer than both are long."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.gpus > 1:
            raise ValueError("a worker drives one GPU; raise workers.count instead of workers.gpus")
        if (self.min is None) != (self.max is None):
            raise ValueError("give workers.min and workers.max together, or neither")
        if self.min is not None and self.max is not None:
            if self.count != 1:
                raise ValueError("give either workers.count or workers.min and workers.max")
            if self.min > self.max:
                raise ValueError(f"workers.min {self.min} is larger than workers.max {self.max}")
        return self

    @property
    def least(self) -> int:
        """Fewest processes."""
        return self.min or self.count

    @property
    def most(self) -> int:
        """Most processes."""
        return self.max or self.count


class ValidationSpec(Spec):
    """How the validation split is looked at."""

    mode: Literal["sync", "async"] = "sync"
    """`sync`: the workers validate between two steps. `async`: a task validates each committed checkpoint while the
    workers continue to train; its metrics are known when the next checkpoint is due."""
    cpus: PositiveInt = 1
    """CPUs of that task; also the number of its compute threads."""
    gpus: int = Field(default=0, ge=0, le=1)
    """GPUs of that task."""
    timeout_s: PositiveFloat = 600.0
    """A checkpoint whose metrics take longer has none; training continues without them."""

    @property
    def is_async(self) -> bool:
        """Whether a task validates while the workers train."""
        return self.mode == "async"


class CheckpointSpec(Spec):
    """When training state is committed, and how much of it is kept. What one of the rules keeps stays."""

    every_steps: PositiveInt | None = None
    """Optimizer steps between checkpoints; None: at the end of every epoch. The last step always has one."""
    keep_last: PositiveInt = 3
    """Newest committed checkpoints kept; the very newest and pinned ones are never dropped."""
    keep_every_steps: PositiveInt | None = None
    """Also keeps those of steps that this number divides."""
    keep_best: NonNegativeInt = 0
    """Also keeps so many of the best by `metric`; then each state that is validated is committed as well."""
    metric: str = "validation_loss"
    """`loss`, or a metric of the validation split, such as `validation_accuracy`."""
    mode: Literal["min", "max"] = "min"
    """Whether a smaller or a larger metric is better."""
    use: Literal["newest", "best"] = "newest"
    """Which one `evaluate` and `publish` take unless they are told; `best` needs `keep_best`."""
    timeout_s: PositiveFloat = 120.0
    """A save that takes longer fails on all workers; training goes on, and the next save tries again."""

    @model_validator(mode="after")
    def _keeps_what_it_uses(self) -> Self:
        if self.use == "best" and not self.keep_best:
            raise ValueError("use: best needs keep_best of at least 1, or the best one may be gone")
        return self

    def keep(self) -> Keep:
        """The rules of retention."""
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
    """Id of the run; one that exists is refused unless it is resumed."""
    model: ModelSpec
    data: DataSpec
    objective: ObjectiveSpec = ObjectiveSpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    init: InitSpec | None = None
    """Weights to start from; None: those that `seed` draws."""
    ema: EmaSpec | None = None
    """An exponential moving average of the weights; None: none is kept."""
    batch: GlobalBatchSpec = GlobalBatchSpec()
    epochs: PositiveInt | None = None
    """Passes over the training split; 10 unless `steps` is given."""
    steps: PositiveInt | None = None
    """Optimizer steps, instead of `epochs`."""
    early_stopping: EarlyStoppingSpec | None = None
    """Ends the run before that when a metric no longer gets better; None: it goes to its last step."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16` runs the forward pass under autocast, or what is sharded by FSDP2's policy; weights, gradients and optimizer
    state stay float32."""
    max_grad_norm: PositiveFloat | None = None
    """Largest norm of the whole gradient; None: not clipped."""
    seed: NonNegativeInt = 0
    """Decides initial weights, sample order and dropout."""
    deterministic: bool = False
    """Asks torch for deterministic GPU kernels (slower). On CPU a run is repeatable bit for bit either way."""
    log_every: PositiveInt = 10
    """Optimizer steps between logged losses."""
    validate_every: PositiveInt | None = None
    """Optimizer steps between validations; None: at the end of every epoch. The last step always has one."""
    validation: ValidationSpec = ValidationSpec()
    tensorboard: TensorboardSpec = TensorboardSpec()
    callbacks: tuple[CallbackSpec, ...] = ()
    """Code that follows the run: logged steps, validations, checkpoints and the end."""
    workers: WorkersSpec = WorkersSpec()
    parallelism: ParallelismSpec = ParallelismSpec()
    performance: PerformanceSpec = PerformanceSpec()
    storage: StorageSpec = StorageSpec()
    checkpoint: CheckpointSpec = CheckpointSpec()

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.model.is_classical:
            refuse_unused(self, self.model.name)
            parse_classical(self.model.name, self.model.params, self.data.task)
        if self.validation.is_async and self.validate_every is not None:
            raise ValueError(
                "validation.mode async looks at every checkpoint: remove validate_every, and set checkpoint.every_steps"
            )
        if self.epochs is not None and self.steps is not None:
            raise ValueError("give either epochs or steps, not both")
        for layout in self.layouts():
            if self.batch.global_size < layout.dp:
                raise ValueError(
                    f"batch.global_size {self.batch.global_size} is smaller than the {layout.dp} replicas and shards of "
                    f"{layout.world} workers: some of them would never see a sample"
                )
        loss_name(self.objective, self.data.task)  # refuses a loss that does not fit the task
        return self

    def stopper(self) -> Stopper | None:
        """What decides whether the run ends early, if something does."""
        early, by = self.early_stopping, self.checkpoint
        if early is None:
            return None
        return Stopper(early.metric or by.metric, early.mode or by.mode, early.patience, early.min_delta)

    def layouts(self) -> list[MeshLayout]:
        """The layout of each number of workers with which the run may go on, fewest first.

        Raises:
            SpecError: there is none.
        """
        if self.workers.max is None:
            return [self.parallelism.resolve(self.workers.count)]
        return [
            self.parallelism.resolve(size) for size in self.parallelism.sizes(self.workers.least, self.workers.most)
        ]

    def stop_position(self, num_rows: int) -> int:
        """Global sample position at which the run ends: epochs x rows, or steps x global batch.

        Args:
            num_rows: rows of the training split.
        """
        if self.steps is not None:
            return self.steps * self.batch.global_size
        return (self.epochs or 10) * num_rows

    def total_steps(self, num_rows: int) -> int:
        """Optimizer steps of the whole run; the last batch may be smaller than the others."""
        return -(-self.stop_position(num_rows) // self.batch.global_size)

    def same_training(self, other: "TrainSpec") -> list[str]:
        """Names of the fields that would make `other` another run; empty if it can be resumed from this one's checkpoints.

        Where it is stored, how often it is checkpointed, validated or logged, whether it stops early, on which workers it
        runs, how they share the model, how fast they are and how much a file may expand may change.
        """
        free = {"storage", "workers", "parallelism", "performance", "checkpoint", "log_every", "validate_every"}
        free |= {"early_stopping", "validation", "tensorboard", "callbacks"}
        mine, theirs = (masked(one.model_dump(mode="json")) for one in (self, other))  # as runs are written down
        for fields in (mine, theirs):
            del fields["batch"]["accumulation_steps"]  # how a share is cut changes no gradient
            del fields["optimizer"]["implementation"]  # which kernels compute the same update
            fields["data"].pop("max_expansion", None)  # what is refused, which the prepared data no longer needs
        return sorted(name for name in mine.keys() - free if mine[name] != theirs[name])
