"""Notices a network that ends in softmax or sigmoid, although the built-in losses of classifiers apply them to logits.

Such a network trains, but slowly and to a worse loss: of K probabilities, a second softmax makes at most e / (e + K - 1).
"""

import copy
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

_SCALE = 1000.0
"""Weights of this factor give logits far outside [0, 1]."""


@torch.no_grad()
def normalized_output(
    net: nn.Module, compute: Callable[[nn.Module], Tensor], num_outputs: int
) -> Literal["softmax", "sigmoid"] | None:
    """The function that a network ends in, if it computes probabilities instead of logits.

    Args:
        net: a classifier with its weights.
        compute: (net) -> its outputs [..., K] of some rows.
        num_outputs: K; with a single one, the network may end in a sigmoid.
    """
    was_training = net.training
    outputs = compute(net.eval()).double()
    net.train(was_training)
    if not bool(((outputs >= 0) & (outputs <= 1)).all()):
        return None
    if num_outputs > 1:
        sums = outputs.sum(dim=-1)
        return "softmax" if torch.allclose(sums, torch.ones_like(sums), rtol=0, atol=1e-4) else None
    if bool(((outputs == 0) | (outputs == 1)).any()):
        return None
    scaled = copy.deepcopy(net).eval()
    for weight in scaled.parameters():
        if weight.is_floating_point():
            weight.mul_(_SCALE)
    outputs = compute(scaled).double()
    return "sigmoid" if bool(((outputs >= 0) & (outputs <= 1)).all()) else None
