"""Finds out why a model's results differ between two runs on the same rows. Independent of graphs and runtimes.

A served model gets the rows of unrelated requests in one batch, so each row's result must depend on that row alone.
"""

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maas_ray.export.obstacles import describe_failure

_ROWS = 8
"""Rows that are computed together and alone."""
_ATOL, _RTOL = 1e-4, 1e-3
"""Above the rounding differences between batch sizes."""

_MIXING_FIX = (
    "A served batch contains rows of unrelated requests: compute statistics over the values of each row (LayerNorm), use "
    "running statistics (BatchNorm in evaluation mode), and set batch_first=True on attention and recurrent layers"
)


def explain_differences(served: nn.Module, columns: Sequence[Tensor], name: str) -> str | None:
    """The reason why a module's results for a row vary, or None if they do not.

    Args:
        served: module in evaluation mode; its buffers are kept.
        columns: its inputs, [N, …] each.
        name: class of the model, for the message.
    """
    rows = [column[:_ROWS] for column in columns]
    kept = {key: buffer.clone() for key, buffer in served.named_buffers()}
    try:
        together, again = _trace(served, rows), _trace(served, rows)
        if (place := _first_difference(served, together, again, len(rows[0]))) is not None:
            return (
                f"{name} gives different results for the same rows in evaluation mode, in {place}: it uses random numbers, "
                "or changes its own state; make forward a function of the rows and the weights unless self.training is set"
            )
        for row in range(len(rows[0])):
            try:
                alone = _trace(served, [column[row : row + 1] for column in rows])
            except Exception as error:  # the user's code may raise anything
                return f"{name} mixes the rows of a batch: it fails on a single row: {describe_failure(error)}. {_MIXING_FIX}"
            place = _first_difference(served, {key: _row(value, row) for key, value in together.items()}, alone, 1)
            if place is not None:
                return (
                    f"{name} mixes the rows of a batch: the result for a row depends on the other rows, in {place}. "
                    f"{_MIXING_FIX}"
                )
    finally:
        with torch.no_grad():
            for key, buffer in served.named_buffers():
                if key in kept:
                    buffer.copy_(kept[key])
    return None


Call = tuple[str, list[Tensor], list[Tensor]]
"""Name of a module, and the tensors of a call to it with their results."""


def _trace(served: nn.Module, columns: Sequence[Tensor]) -> dict[int, Call]:
    """The calls of all modules during a forward pass, in the order in which they end."""
    calls: dict[int, Call] = {}

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            given = [*args, *kwargs.values()]
            results = result if isinstance(result, tuple | list) else [result]
            calls[len(calls)] = (name, _clones(given), _clones(results))

        return hook

    with ExitStack() as hooks, torch.no_grad():
        for name, module in served.named_modules():
            hooks.callback(module.register_forward_hook(record(name), with_kwargs=True).remove)
        served(*columns)
    return calls


def _clones(values: Sequence[Any]) -> list[Tensor]:
    return [value.detach().clone() for value in values if isinstance(value, Tensor)]


def _row(call: Call, row: int) -> Call:
    name, given, results = call
    return name, [value[row : row + 1] for value in given], [value[row : row + 1] for value in results]


def _first_difference(served: nn.Module, first: dict[int, Call], second: dict[int, Call], count: int) -> str | None:
    """The innermost module that returned different results for equal inputs; None if the final results agree."""
    last = max(first, default=-1)
    if last < 0 or last not in second or _agree(first[last][2], second[last][2]):
        return None
    for number, (name, given, results) in first.items():
        other = second.get(number)
        if other is None or other[0] != name:
            break
        is_batch = all(len(value) == count for value in (*given, *results) if value.dim())
        if given and is_batch and _agree(given, other[1]) and not _agree(results, other[2]):
            return _describe(name, served.get_submodule(name))
    return _describe("", served)


def _agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(
        one.shape == other.shape
        and torch.allclose(one.double(), other.double(), rtol=_RTOL, atol=_ATOL, equal_nan=True)
        for one, other in zip(first, second, strict=True)
    )


def _describe(name: str, module: nn.Module) -> str:
    """`'bn' (BatchNorm1d)`, with the line of `forward` if it is not torch's."""
    kind = type(module)
    shown = name.removeprefix("_model.").removeprefix("net").removeprefix(".")
    where = f"the layer {shown!r} ({kind.__name__})" if shown else f"forward of {kind.__name__}"
    if kind.__module__.split(".")[0] in ("torch", "maas_ray"):
        return where
    try:
        source, (_, number) = inspect.getsourcefile(kind), inspect.getsourcelines(kind.forward)
    except (OSError, TypeError):  # defined without a file
        return where
    return f"{where}, {Path(source or '').name}:{number}"
