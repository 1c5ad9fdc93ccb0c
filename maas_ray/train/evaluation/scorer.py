"""Wraps a TrainState on any layout as one module for evaluation. Independent of metrics and data sources."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from maas_ray.train.loop.plan import LoopPlan
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.parallel.pipeline import MicroBatch


class Scorer(nn.Module):
    """Encoded raw columns -> logits, on every rank of the group with these rows.

    All ranks that share a replica must call it equally often, since each has a part of the model.

    Args:
        state: state of this rank.
        plan: the plan of the run, which determines the size of a pipeline's micro-batches.
        num_microbatches: number of micro-batches per step.
    """

    def __init__(self, state: TrainState, plan: LoopPlan, num_microbatches: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(state.parts)
        self._state = state
        self._num_microbatches = num_microbatches
        self._size = state.microbatch_rows(plan, num_microbatches)

    def forward(self, *columns: Tensor) -> Tensor:
        """Computes logits; see the class."""
        state = self._state
        rows = state.preprocess(*columns)
        rows = rows.to(state.dtype) if rows.is_floating_point() else rows
        if state.pipeline is None:
            model = state.model
            # Each rank evaluates its own number of batches, without DistributedDataParallel.
            logits: Tensor = (model.module if isinstance(model, DistributedDataParallel) else model)(rows)
            return logits
        return torch.cat(
            [piece for start in range(0, len(rows), self._step_rows) for piece in self._piped(rows, start)]
        )

    @property
    def _step_rows(self) -> int:
        return self._size * self._num_microbatches

    def _piped(self, rows: Tensor, start: int) -> list[Tensor]:
        pipeline = self._state.pipeline
        if pipeline is None:
            return []
        batches: list[MicroBatch] = []
        for number in range(self._num_microbatches):
            first = start + number * self._size
            piece = rows[first : first + self._size]
            num_rows = len(piece)
            piece = functional.pad(piece, (0, 0) * (piece.dim() - 1) + (0, self._size - num_rows))
            positions = torch.zeros(self._size, dtype=torch.int64)
            batches.append(MicroBatch(piece, positions, positions, num_rows))
        return pipeline.logits(batches)
