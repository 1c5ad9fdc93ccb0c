"""Trained weights that a model's logits do not depend on. Knows no layout.

Torch trains such a model in one process and says nothing: their gradient is None, and they stay as they are. Replicas
(DistributedDataParallel) wait for every gradient, unless they are told to look which ones will come.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError

UNEQUAL = "Expected to have finished reduction in the prior iteration"
"""With what DistributedDataParallel refuses the step after one in which a gradient did not come."""


def unused_weights(net: nn.Module, rows: Tensor) -> list[str]:
    """Names of the trained weights that have no part in the logits of these rows. A frozen weight is none.

    Args:
        net: the whole model, with its data; not compiled, which this would do first.
        rows: that it takes, [N, ...].

    Raises:
        ModelError: none has a part.
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
            f"the logits of {type(net).__name__} depend on none of its {len(trained)} trained weights, so there is nothing to "
            "learn; is there a detach(), .data, numpy or torch.no_grad() in its forward?"
        )
    return [name for name, weight in trained if id(weight) not in used]


def unequal_use(error: RuntimeError) -> ModelError:
    """What replicas say that did not all use the same weights, in words that name the way out."""
    return ModelError(
        "replicas (DDP) did not get the gradient of every weight: which weights the model uses depends on the rows, or on "
        "chance; let every pass use all of them (adding 0 * weight.sum() to the logits is enough), or train with one "
        f"worker. torch says: {' '.join(str(error).split())[:200]}"
    )


def _leaves(logits: Tensor) -> Iterator[Tensor]:
    """What the gradient of the logits would be added to."""
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
