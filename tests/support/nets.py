"""Modules that specs name by import path: one that fits, and ones that go wrong in a way a user's might."""

import time

import torch
from torch import Tensor, nn


class Flat(nn.Module):
    """A linear model; takes what the family models take."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_outputs))

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class Probabilities(Flat):
    """Ends in softmax."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(dim=-1)


class TurnsToNan(Flat):
    """Computes numbers until it is trained for a while."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits * torch.nan if self.training and len(x) > 1 else logits


class Raises(Flat):
    """Fails in the middle of training, with an error that is not ours."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 1:
            raise ValueError("the module's own mistake")
        return super().forward(x)


class ScalesItsGradient(Flat):
    """Trains as it should in one process; with several, its gradient is half as large again."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        if logits.requires_grad and torch.distributed.is_initialized():
            logits.register_hook(lambda gradient: gradient * 1.5)
        return logits


class DrawsByRank(Flat):
    """Noise as torch draws it: other ranks have other generators."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randn_like(x) if self.training else x)


class LooksAtValues(Flat):
    """Does one thing or another, depending on what it is fed with."""

    def forward(self, x: Tensor) -> Tensor:
        logits = super().forward(x)
        return logits if float(x.sum()) < 1e9 else -logits


class HidesWhatItNeeds(nn.Module):
    """Its head needs something of its first layer, and takes it from where neither arguments nor autograd lead."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.kept: list[Tensor] = []
        self.flatten = nn.Flatten()
        self.layers = nn.ModuleList([_Keeps(self.kept, *input_shape, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
        self.head = nn.Linear(8, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.flatten(x)
        for layer in self.layers:
            x = layer(x).tanh()
        logits: Tensor = self.head(x) * self.kept[-1]
        return logits


class _Keeps(nn.Linear):
    def __init__(self, kept: list[Tensor], num_in: int, num_out: int) -> None:
        super().__init__(num_in, num_out)
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        self.kept[:] = [self.weight.detach().abs().sum()]
        return super().forward(x)


class SleepsInEachStep(Flat):
    """Takes minutes for each step of training."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 2:
            time.sleep(300)
        return super().forward(x)


class _FailsWhereSplit(nn.Linear):
    """A layer that notices gradients of inputs: a stage receives them, the whole model does not."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.grad_fn is not None and "ContiguousGradient" in type(x.grad_fn).__name__:
            raise ValueError("no stages, please")
        return super().forward(x)


class FailsInStages(nn.Sequential):
    """Trains as it should in one process; a stage of a pipeline fails."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__(nn.Linear(input_shape[0], 8), _FailsWhereSplit(8, num_outputs))


class Recurrent(nn.Module):
    """An LSTM of two layers in both directions, whose results and gradients are transposed views."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        super().__init__()
        self.enter = nn.Linear(1, 8)
        self.lstm = nn.LSTM(8, 8, num_layers=2, bidirectional=True, batch_first=True)
        self.leave = nn.Linear(16, num_outputs)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.leave(self.lstm(self.enter(x[:, :, None]))[0].mean(1))
        return logits


class _Turned(nn.Linear):
    """Returns a transposed view."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(1, -1)


class Turned(nn.Sequential):
    """A sequence whose layers end in transposed views, and whose gradients are such views."""

    def __init__(self, input_shape: tuple[int, ...], num_outputs: int) -> None:
        (width,) = input_shape
        layers = [nn.Unflatten(1, (width, 1)), _Turned(1, 5), _Turned(width, 4), _Turned(5, 3), nn.Flatten()]
        super().__init__(*layers, nn.Linear(12, num_outputs))
