"""The training state of one rank: its part of the network, and what a step needs beside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from maas_ray.data.loading.rows import Batch
from maas_ray.models.weights import weights
from maas_ray.train.loop.auxiliary import AuxiliaryLosses
from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.modules.batch_statistics import fewest_rows
from maas_ray.train.optim.average import OptimizerAverage
from maas_ray.train.optim.ema import Ema
from maas_ray.train.optim.schedule import Schedule
from maas_ray.train.parallel.mesh import RankCoordinates
from maas_ray.train.parallel.pipeline import Pipeline

LossFn = Callable[[Tensor, Tensor], Tensor]
"""(logits [N, K], target [N]) -> loss of each sample [N]."""


@dataclass(frozen=True)
class TrainState:
    """The training state of this rank.

    Attributes:
        parts: this rank's parts of the network: all of it, or its pipeline stages; possibly with DTensors.
        model: preprocessed rows -> logits [N, K], the part wrapped for data parallelism; unused with a pipeline.
        preprocess: encoded raw columns -> preprocessed rows.
        num_valid: (target) -> number of its losses; None: one for each row.
        row_weights: the weights of rows in the loss, whose sum then replaces the number of losses; None: no weights.
        l1: factor of the sum of absolute weights, added to the mean loss.
        l2: factor of the sum of squared weights.
        average: the average of the weights that is evaluated and published, if any.
        pipeline: the schedule of the stages, if any.
        auxiliary: the auxiliary losses of the network, if any.
        dtype: type of floating-point rows of the network.
    """

    parts: Sequence[nn.Module]
    model: nn.Module
    preprocess: Callable[..., Tensor]
    loss: LossFn
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    device: torch.device
    coordinates: RankCoordinates
    num_valid: Callable[[Tensor], Tensor] | None = None
    row_weights: Callable[[Batch], Tensor] | None = None
    l1: float = 0.0
    l2: float = 0.0
    average: Ema | OptimizerAverage | None = None
    pipeline: Pipeline | None = None
    auxiliary: AuxiliaryLosses | None = None
    dtype: torch.dtype = torch.float32

    @property
    def weights(self) -> list[nn.Parameter]:
        """The trained weights of this rank that are penalized."""
        return [weight for part in self.parts for weight in weights(part) if weight.requires_grad]

    @property
    def min_rows(self) -> int:
        """The smallest number of rows of a micro-batch that is not empty."""
        return fewest_rows(self.parts)

    def train(self, mode: bool = True) -> None:
        """Switches all parts to training mode, or to evaluation mode."""
        for part in self.parts:
            part.train(mode)

    def microbatch_rows(self, plan: LoopPlan, num_microbatches: int) -> int:
        """Rows of each micro-batch of a full step."""
        share = -(-plan.global_size // self.coordinates.layout.dp)
        return -(-share // num_microbatches)

    def rows(self, batch: Batch) -> Tensor:
        """The input of the network for a batch."""
        columns = [column.to(self.device, non_blocking=True) for column in batch.columns]
        rows = self.preprocess(*columns)
        return rows.to(self.dtype) if rows.is_floating_point() else rows
