"""Losses, metrics, optimizers and schedules that specs name by import path: ones that fit, and ones that do not."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import Metric

from tests.support.nets import Flat


class TunedLoss(nn.Module):
    """Cross entropy with a weight for each class."""

    def __init__(self, power: float = 1.0) -> None:
        super().__init__()
        self.power = power
        self.register_buffer("share", torch.tensor(0.5))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return self.share * functional.cross_entropy(logits, target, reduction="none") ** self.power


def absolute(logits: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    return scale * (logits - target).abs()


def mean_of_batch(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits, target)


def centered(logits: Tensor, target: Tensor) -> Tensor:
    """Depends on the other rows of the batch."""
    return functional.cross_entropy(logits - logits.mean(dim=0), target, reduction="none")


def detached(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits.detach(), target, reduction="none")


def infinite(logits: Tensor, target: Tensor) -> Tensor:
    return functional.cross_entropy(logits, target, reduction="none") / 0.0


def of_one_argument(logits: Tensor) -> Tensor:
    return logits.sum(dim=1)


class WithCenters(nn.Module):
    """Has parameters of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.zeros(4))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return (logits - self.centers).square().sum(dim=1)


class Counts(nn.Module):
    """Its result depends on the number of calls so far."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        self.calls += 1
        return functional.cross_entropy(logits, target, reduction="none") / self.calls


class Misses(Metric):
    """Number of wrong rows; a sum over ranks."""

    higher_is_better = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("wrong", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, target: Tensor) -> None:
        self.wrong += (predictions.argmax(dim=1) != target).sum()

    def compute(self) -> Tensor:
        return self.wrong


def is_right(predictions: Tensor, target: Tensor) -> Tensor:
    return (predictions.argmax(dim=1) == target).float()


def overall(predictions: Tensor, target: Tensor) -> Tensor:
    return is_right(predictions, target).mean()


class Momentum(torch.optim.Optimizer):
    """Gradient descent with momentum; counts steps as a number of the weight and of the group."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0, decay: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "decay": decay, "rounds": 0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["rounds"] += 1
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["mean"], state["count"], state["size"] = torch.zeros_like(weight), 0, 1.0
                state["count"] += 1
                state["size"] *= 0.999
                state["mean"].mul_(group["decay"]).add_(weight.grad)
                corrected = state["mean"] / (1 - group["decay"] ** state["count"])
                weight.sub_(corrected, alpha=group["lr"] * state["size"] / math.sqrt(group["rounds"]))


class Forgets(Momentum):
    """Keeps what a step depends on where no checkpoint finds it."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, lr)
        self.rounds = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.rounds += 1
        for group in self.param_groups:
            for weight in group["params"]:
                weight.sub_(weight.grad, alpha=group["lr"] / self.rounds)


class KeepsAList(Momentum):
    """Keeps a list as state."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step()
        for values in self.state.values():
            values["past"] = [1.0]


class StandsStill(Momentum):
    """Changes nothing."""

    def step(self, closure: Any = None) -> None: ...


class Switches(Momentum):
    """Has other weights in evaluation, and changes its state when it returns from it."""

    def eval(self) -> None: ...

    def train(self) -> None:
        for state in self.state.values():
            state["mean"].mul_(0.5)


def halved(step: int, total_steps: int, after: float = 0.5) -> float:
    return 1.0 if step < after * total_steps else 0.5


def negative(step: int, total_steps: int) -> float:
    return -1.0


class Falls:
    """Falls with every call."""

    def __init__(self) -> None:
        self.value = 1.0

    def __call__(self, step: int, total_steps: int) -> float:
        self.value *= 0.9
        return self.value


class Experts(Flat):
    """Returns the size of its logits as auxiliary losses."""

    def forward(self, x: Tensor) -> Any:
        logits = super().forward(x)
        return (logits, {"size": logits.square().mean(dim=1), "ignored": logits[:, 0]}) if self.training else logits
