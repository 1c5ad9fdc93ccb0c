"""Finds trained weights that do not affect a model's logits. Independent of layouts.

In one process torch trains such a model silently: the gradient of these weights is None, and they do not change.
Replicas (DistributedDataParallel) wait for every gradient unless they search for unused parameters.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError

UNEQUAL = "Expected to have finished reduction in the prior iteration"
"""Part of DistributedDataParallel's error in the step after one with a missing gradient."""


def unused_weights(net: nn.Module, rows: Tensor) -> list[str]:
    """Names of the trained weights that do not affect the logits of these rows; frozen weights are not included.

    Args:
        net: the whole model, with its data; not compiled, since this call would trigger the compilation.
        rows: input rows, [N, ...].

    Raises:
        ModelError: the logits depend on no trained weight.
    """
    modes = {module: module.training for module in net.modules()}
    try:
        with torch.enable_grad():
            logits = net.eval()(rows)
    finally:
        for module, is_training in modes.items():
            module.training = is_training
    used = {id(weight) for weight in _leaves(logits)}
    trained = [(name, weight) for name, weight in net.named_parameters() if weight.requires_grad]
    if trained and not used:
        raise ModelError(
            f"the logits of {type(net).__name__} depend on none of its {len(trained)} trained weights, so that it "
            "cannot learn; check its forward for detach(), .data, numpy or torch.no_grad()"
        )
    return [name for name, weight in trained if id(weight) not in used]


def unequal_use(error: RuntimeError) -> ModelError:
    """Converts the error of replicas that used different weights to one with a fix."""
    return ModelError(
        "replicas (DDP) did not get the gradient of every weight: the weights that the model uses depend on the rows "
        "or on random numbers; use all of them in every pass (adding 0 * weight.sum() to the logits suffices), or "
        f"train with one worker. Error of torch: {' '.join(str(error).split())[:200]}"
    )


def _leaves(logits: Tensor) -> Iterator[Tensor]:
    """The tensors to which the gradient of the logits would be added."""
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            yield leaf
        waiting += [before for before, _ in node.next_functions]
