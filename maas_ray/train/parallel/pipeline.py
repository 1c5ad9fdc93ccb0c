"""Pipeline stages, run by torch's schedules. Independent of data parallelism.

The stages of an `nn.Sequential` are slices of it; for other modules see train/parallel/stages.py. Both keep the names
of layers, so that a checkpoint is independent of the number of stages.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.utils._pytree import tree_map_only

from maas_ray.errors import ModelError, SpecError
from maas_ray.suggestions import did_you_mean
from maas_ray.train.modules.dropout import samples
from maas_ray.train.parallel.staged_module import StagedModule, Unit
from maas_ray.train.parallel.stages import find_units, stage_modules
from maas_ray.train.spec.parallelism import MeshLayout

_SCHEDULES: dict[str, Any] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B, "interleaved": ScheduleInterleaved1F1B}

_CPU = torch.device("cpu")
_MAX_DIMS = 6
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class MicroBatch(NamedTuple):
    """The rows of one micro-batch; those after the real ones are padding."""

    rows: Tensor
    """Input [R, …]."""
    target: Tensor
    """[R, …]"""
    positions: Tensor
    """int64 [R]"""
    num_rows: int
    """Number of real rows."""
    weights: Tensor | None = None
    """Weights of the real rows in the loss, [num_rows]; None: no weights."""


def num_layers(net: nn.Module) -> int:
    """Number of layers with weights between which a model can be split into stages."""
    if _is_sequence(net):
        return sum(any(True for _ in layer.parameters()) for layer in net.children())
    return len(find_units(net))


def refuse_microbatches(layout: MeshLayout, number: int) -> None:
    """Refuses a number of micro-batches that the schedule of a layout does not support.

    Raises:
        SpecError: there are too few, or the number is no multiple of the stages.
    """
    if layout.pp > 1 and (number < layout.pp or (layout.schedule == "interleaved" and number % layout.pp)):
        raise SpecError(
            f"batch.accumulation_steps: a pipeline of {layout.pp} stages with the schedule {layout.schedule} needs "
            f"{'a multiple of ' if layout.schedule == 'interleaved' else 'at least '}{layout.pp} micro-batches, got "
            f"{number}"
        )


def split_layers(
    net: nn.Module,
    num_stages: int,
    *,
    named: Sequence[str] | None = None,
    example: Tensor | None = None,
    device: torch.device = _CPU,
) -> list[nn.Module]:
    """Splits a model into stages that share its weights.

    Args:
        net: a sequence of layers, or any module if `example` is given.
        num_stages: number of stages.
        named: first layers of the second and each later stage; None: stages have about the same number of
            parameters.
        example: input rows, [any number, …].
        device: device of the stages.

    Raises:
        ModelError: the model cannot be split this way, has too few layers, or shares a weight between two stages.
    """
    layers = dict(net.named_children())
    if _is_sequence(net) and all(name in layers for name in named or ()):
        sizes = {name: sum(weight.numel() for weight in layer.parameters()) for name, layer in layers.items()}
        cuts = [0, *_starts(sizes, num_stages, named), len(layers)]
        slices = pairwise(cuts)
        stages: list[nn.Module] = [nn.Sequential(OrderedDict(list(layers.items())[i:j])) for i, j in slices]
    elif example is None:
        raise ModelError(
            f"parallelism.pp: {type(net).__name__} cannot be split into pipeline stages without example rows; it must "
            "be a torch.nn.Sequential of named layers, each with one input and one output tensor"
        )
    else:

        def choose(units: list[Unit]) -> list[int]:
            # A layer that receives no earlier result cannot be the first of a stage: it belongs to the previous layer.
            sizes: dict[str, int] = {}
            for unit in units:
                first = unit.name if unit.crossing or not sizes else list(sizes)[-1]
                sizes[first] = sizes.get(first, 0) + unit.size
            names = [unit.name for unit in units]
            return [names.index(list(sizes)[start]) for start in _starts(sizes, num_stages, named)]

        stages = stage_modules(net, example, device, choose, named or ())
    _refuse_shared(stages)
    return stages


def _is_sequence(net: nn.Module) -> bool:
    return isinstance(net, nn.Sequential) and type(net).forward is nn.Sequential.forward


def _starts(sizes: Mapping[str, int], num_stages: int, named: Sequence[str] | None) -> list[int]:
    """Index of the first layer of each stage but the first, given the number of weights of each layer."""
    if named is None:
        if (count := sum(size > 0 for size in sizes.values())) < num_stages:
            raise ModelError(
                f"parallelism.pp: {num_stages} stages need {num_stages} layers with weights, but the model has "
                f"{count}; use fewer stages"
            )
        return _cuts(list(sizes.values()), num_stages)
    names = list(sizes)
    for name in named:
        if name not in sizes:
            hint = did_you_mean(name, names, f"layers: {', '.join(names)}")
            raise ModelError(f"parallelism.pp_split: no stage of this model can start at {name!r}; {hint}")
    starts = [names.index(name) for name in named]
    if len(starts) != num_stages - 1 or sorted({0, *starts}) != [0, *starts]:
        raise ModelError(
            f"parallelism.pp_split: {', '.join(named)} cannot be the first layers of stages 2 to {num_stages}; give "
            f"{num_stages - 1} different layers in the order {', '.join(names[1:])}"
        )
    for start, stop in pairwise([0, *starts, len(names)]):
        if not any(sizes[name] for name in names[start:stop]):
            raise ModelError(
                f"parallelism.pp_split: the stage that starts at {names[start]} has no weights; move its start"
            )
    return starts


def _cuts(sizes: Sequence[int], num_stages: int) -> list[int]:
    """Index of the first layer of each stage but the first, such that the largest stage is as small as possible."""
    before = [0, *accumulate(sizes)]
    # best[n] for k stages: the smallest possible largest stage of the first n layers, and the start of the last one.
    best = [(float(before[n]) if before[n] else float("inf"), 0) for n in range(len(sizes) + 1)]
    tables = [best]
    for _ in range(num_stages - 1):
        row = [(float("inf"), 0)] * (len(sizes) + 1)
        for n in range(1, len(sizes) + 1):
            for start in range(1, n):
                last = before[n] - before[start]
                largest = max(tables[-1][start][0], last)
                if last and largest < row[n][0]:
                    row[n] = (largest, start)
        tables.append(row)
    cuts, end = [], len(sizes)
    for table in reversed(tables[1:]):
        end = table[end][1]
        cuts.append(end)
    return cuts[::-1]


def _refuse_shared(stages: Sequence[nn.Module]) -> None:
    owners: dict[int, tuple[int, str]] = {}
    for index, stage in enumerate(stages):
        for name, parameter in stage.named_parameters():
            owner, first = owners.setdefault(id(parameter), (index, name))
            if owner != index:
                raise ModelError(
                    f"parallelism.pp: {first} and {name} are the same weight, but belong to the stages {owner} and "
                    f"{index}; untie them, or use another layout"
                )


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is contiguous."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _contiguous_gradient(value: Tensor) -> Tensor:
    same: Tensor = _ContiguousGradient.apply(value)  # type: ignore[no-untyped-call]
    return same


def _send_contiguous(part: nn.Module) -> None:
    """Makes what a stage sends contiguous, as gloo and NCCL need it: its results, and the gradients of its inputs.

    Torch allocates the buffers of a stage's receivers with the strides of the sender, so both sides depend on this. A
    stage that ends in a transposed view, or begins with a layer whose gradient is one (a recurrent layer with
    `batch_first`), would otherwise fail at its first step.
    """

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            _contiguous_gradient(value) if isinstance(value, Tensor) and value.requires_grad else value
            for value in args
        )

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> Any:
        return tree_map_only(Tensor, Tensor.contiguous, result)

    part.register_forward_pre_hook(before)
    part.register_forward_hook(after)


class _Stage(PipelineStage):
    """A stage that sets the samples of each micro-batch, for dropout."""

    seed = 0
    positions: Sequence[Tensor] = ()

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        with samples(self.seed, self.positions[fwd_chunk_id]):
            return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)


class Pipeline:
    """This rank's stages and the schedule that runs the stages of all ranks.

    Args:
        parts: this rank's stages, wrapped for data parallelism; two with `interleaved`, else one.
        layout: sizes and schedule.
        rank: position of this rank in the pipeline.
        group: process group of the pipeline.
        num_microbatches: number of micro-batches per step.
        loss: (logits, target) -> loss of each row [R].
        seed: seed of the run.
        device: device of this rank.

    Raises:
        SpecError: the schedule needs more micro-batches.
    """

    def __init__(
        self, parts: Sequence[nn.Module], layout: MeshLayout, *, rank: int, group: dist.ProcessGroup,
        num_microbatches: int, loss: Callable[[Tensor, Tensor], Tensor], seed: int, device: torch.device,
    ) -> None:  # fmt: skip
        refuse_microbatches(layout, num_microbatches)
        for part in parts:
            _send_contiguous(part)
        self._stages = [
            _Stage(part, rank + number * layout.pp, layout.num_stages, device, group=group)
            for number, part in enumerate(parts)
        ]
        self.is_last = any(stage.is_last for stage in self._stages)
        self._is_first = any(stage.is_first for stage in self._stages)
        self._takes_rows = any(isinstance(part, StagedModule) for part in parts)
        self._group = group
        self._last_rank = dist.get_global_rank(group, layout.pp - 1)
        self._loss = loss
        self._scale: float | None = None
        self._batches: Sequence[MicroBatch] = ()
        self._seed = seed
        self._num_microbatches = num_microbatches
        several = layout.num_stages > layout.pp
        self._schedule = _SCHEDULES[layout.schedule](
            self._stages if several else self._stages[0],
            num_microbatches,
            loss_fn=self._loss_of,
            scale_grads=False,  # the loss is divided by the rows of the global batch
        )
        self._logits: list[Tensor] = []

    def step(self, batches: Sequence[MicroBatch], scale: float) -> Tensor:
        """Forward and backward pass of one step.

        Args:
            batches: the micro-batches, all with the same shape.
            scale: factor of the sum of the losses.

        Returns:
            The scaled sum of this rank's losses; 0 on ranks without the last stage.
        """
        self._begin(batches, scale)
        losses: list[Tensor] = []
        # torch first runs each stage once with the first micro-batch, to determine its shapes.
        with samples(self._seed, batches[0][2]):
            self._schedule.step(
                *self._inputs(), target=self._numbers(), losses=losses, return_outputs=False, **self._all_rows()
            )
        total = torch.zeros((), dtype=torch.float64, device=batches[0][0].device)
        for loss in losses:
            total += loss.detach()
        return total

    def logits(self, batches: Sequence[MicroBatch]) -> list[Tensor]:
        """Forward pass only: the logits of the real rows of each micro-batch, on every rank of the pipeline."""
        self._begin(batches, None)
        with torch.no_grad(), samples(self._seed, batches[0][2]):
            self._schedule.eval(*self._inputs(), target=self._numbers(), losses=[], **self._all_rows())
        counts = [batch[3] for batch in batches]
        return list(torch.split(self._from_last(batches[0][0].device), counts))

    def _from_last(self, device: torch.device) -> Tensor:
        """Broadcasts the logits of the last stage to all ranks of the pipeline."""
        shape = torch.zeros(_MAX_DIMS, dtype=torch.int64, device=device)
        mine = torch.cat(self._logits) if self.is_last else torch.empty(0)
        if self.is_last:
            shape[: mine.dim()] = torch.tensor(mine.shape, device=device)
            shape[-1] = _DTYPES.index(mine.dtype)
        dist.broadcast(shape, src=self._last_rank, group=self._group)
        sizes = [size for i, size in enumerate(shape[:-1].tolist()) if size or i == 0]
        logits = mine if self.is_last else torch.empty(sizes, dtype=_DTYPES[int(shape[-1])], device=device)
        dist.broadcast(logits, src=self._last_rank, group=self._group)
        return logits

    def _begin(self, batches: Sequence[MicroBatch], scale: float | None) -> None:
        self._batches, self._scale, self._logits = batches, scale, []
        for stage in self._stages:
            stage.seed, stage.positions = self._seed, [batch[2] for batch in batches]

    def _inputs(self) -> tuple[Tensor, ...]:
        return (torch.cat([batch[0] for batch in self._batches]),) if self._is_first else ()

    def _all_rows(self) -> dict[str, Tensor]:
        return {"rows": torch.cat([batch[0] for batch in self._batches])} if self._takes_rows else {}

    def _numbers(self) -> Tensor | None:
        return torch.arange(self._num_microbatches) if self.is_last else None

    def _loss_of(self, logits: Tensor, number: Tensor) -> Tensor:
        batch = self._batches[int(number)]
        num_rows = batch.num_rows
        if self._scale is None:  # only logits are needed
            self._logits.append(logits[:num_rows])
            return logits.new_zeros(())
        if not num_rows:
            return logits.sum() * 0.0
        losses = self._loss(logits[:num_rows], batch.target[:num_rows])
        return (losses if batch.weights is None else losses * batch.weights.to(losses.dtype)).sum() * self._scale
