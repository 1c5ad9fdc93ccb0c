"""Models that compute statistics over the rows of a batch: batch normalization. Independent of layouts and loaders."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm, _BatchNorm

from maas_ray.errors import SpecError

_ONE_ROW = "more than 1 value per channel"
"""Part of torch's error for the statistics of a single value."""


def fewest_rows(parts: Iterable[nn.Module]) -> int:
    """The smallest number of rows of a micro-batch: 2 with batch normalization, else 1."""
    return 2 if any(True for _ in _statistics(parts)) else 1


@contextmanager
def frozen_statistics(parts: Iterable[nn.Module]) -> Iterator[None]:
    """Batch normalizations use their running statistics and do not change them, for rows that do not count."""
    frozen = [module for module in _statistics(parts) if module.training]
    for module in frozen:
        module.training = False
    try:
        yield
    finally:
        for module in frozen:
            module.training = True


def refuse_lone_row(net: nn.Module, rows: Tensor, global_size: int, stop: int) -> None:
    """Refuses a run that has a step of a single row, if the model cannot be trained on one.

    Args:
        net: the whole model, with its data; its statistics and modes are kept.
        rows: example rows [N, …], at least one.
        global_size: rows of a step.
        stop: rows of the whole run.

    Raises:
        SpecError: the message contains the changes of the spec that avoid the step.
    """
    lone = global_size if global_size == 1 else stop % global_size
    if lone != 1 or fewest_rows([net]) == 1 or not _fails(net, rows[:1]):
        return
    needs = "but batch normalization needs 2 or more"
    if stop == 1:
        raise SpecError(f"epochs: the run has 1 row in all, {needs}; add rows, or use another normalization")
    size = next(size for size in range(max(2, global_size), stop + 2) if stop % size != 1)
    if global_size == 1:
        raise SpecError(f"batch.global_size: every step has 1 row, {needs}; set batch.global_size to {size} or more")
    steps = stop // global_size
    raise SpecError(
        f"batch.global_size: the last of {steps + 1} steps has 1 row ({stop} rows in batches of {global_size}), {needs}; "
        f"set steps: {steps} instead of epochs, which leaves that row out, or set batch.global_size to {size}"
    )


def _fails(net: nn.Module, row: Tensor) -> bool:
    """Whether the model cannot compute statistics of one row; an image has many values per channel."""
    modes = {module: module.training for module in net.modules()}
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    try:
        with torch.no_grad():
            net.train()(row)
    except ValueError as error:
        return _ONE_ROW in str(error)
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        with torch.no_grad():
            for name, buffer in net.named_buffers():
                buffer.copy_(buffers[name])
    return False


def _statistics(parts: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Synchronized normalizations are left out: all ranks must take part in them, and their statistics are global."""
    for part in parts:
        for module in part.modules():
            if isinstance(module, _BatchNorm) and not isinstance(module, SyncBatchNorm):
                yield module
