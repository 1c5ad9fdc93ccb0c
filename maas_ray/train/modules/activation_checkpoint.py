"""Activation checkpointing: blocks discard activations and recompute them in the backward pass. Independent of layouts.

Chen et al. 2016, "Training deep nets with sublinear memory cost", with torch's `checkpoint`. The recomputed values are
bitwise equal: dropout gets the same samples (train/modules/dropout.py), and torch's generators are restored.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from maas_ray.errors import ModelError
from maas_ray.train.modules.blocks import Forward, blocks, replace_forward
from maas_ray.train.modules.dropout import Samples, current, resumed
from maas_ray.train.spec.performance import ActivationCheckpointing

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
_aten = torch.ops.aten
_KEPT = [
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten.baddbmm.default,
    _aten.convolution.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]
"""Operations whose results `selective` keeps: they take much time relative to the size of their result."""


def recompute_blocks(net: nn.Module, kind: ActivationCheckpointing) -> None:
    """Adds activation checkpointing to the blocks of a whole model, before it is split. See `PerformanceSpec`.

    Raises:
        ModelError: the model has no blocks.
    """
    if kind == "none":
        return
    found = blocks(net)
    if not found:
        raise ModelError(
            f"performance.activation_checkpointing: {type(net).__name__} has no blocks, which must be in a "
            "torch.nn.Sequential or a torch.nn.ModuleList; move its layers there, or use none"
        )
    for block in found:
        replace_forward(block, _forget if kind == "full" else _forget_most)


def _forget(forward: Forward) -> Forward:
    return _recomputed(forward, lambda: (nullcontext(), nullcontext()))


def _forget_most(forward: Forward) -> Forward:
    return _recomputed(forward, partial(create_selective_checkpoint_contexts, _KEPT))


def _recomputed(forward: Forward, contexts: Callable[[], _Contexts]) -> Forward:
    def recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        return checkpoint(
            partial(forward, self), *args, use_reentrant=False, context_fn=partial(_around, contexts), **kwargs
        )

    return recomputed


def _around(contexts: Callable[[], _Contexts]) -> _Contexts:
    first, again = contexts()
    return first, _Again(current(), again)


class _Again:
    """Context of a recomputation: restores the samples that the block had at its first computation."""

    def __init__(self, rows: Samples | None, inner: AbstractContextManager[Any]) -> None:
        self._rows = rows
        self._inner = inner
        self._stack = ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(resumed(self._rows and self._rows.copy()))
        self._stack.enter_context(self._inner)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._stack.__exit__(kind, error, trace)
