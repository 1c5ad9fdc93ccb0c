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
