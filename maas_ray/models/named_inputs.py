"""Calls a user's module with columns as named arguments; from outside it takes flat rows, like every other model.

The class is derived from the user's, so that names of weights, tensor-parallel plans and pipeline stages are those of
the user's module.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, get_args

import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.row import ColumnKind, InputColumn, Row
from maas_ray.suggestions import did_you_mean

KIND = "kind:"
"""Prefix of a group of all columns of one kind, such as `kind:numeric`."""


@dataclass(frozen=True)
class Argument:
    """One argument of forward."""

    name: str
    columns: tuple[InputColumn, ...]
    """Its columns in order; `start` is the position in the argument."""
    positions: tuple[int, ...]
    """Position in the row of each of its values."""

    @property
    def is_codes(self) -> bool:
        """Whether it consists of ordinal codes, which are passed as int64."""
        return self.columns[0].kind == "ordinal"

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes without the batch dimension: [width], or those of a single tensor column."""
        return self.columns[0].shape if len(self.columns) == 1 else (len(self.positions),)

    def take(self, rows: Tensor) -> Tensor:
        """The values [N, *shape] of flat rows [N, W]: float, or int64 for codes."""
        first, count = self.positions[0], len(self.positions)
        is_range = self.positions == tuple(range(first, first + count))
        values = rows[:, first : first + count] if is_range else rows[:, list(self.positions)]
        return values.to(torch.int64) if self.is_codes else values.reshape(-1, *self.shape)


def resolve_inputs(path: str, inputs: Mapping[str, str | Sequence[str]], row: Row) -> list[Argument]:
    """The arguments that `model.inputs` describes.

    Args:
        path: import path of the class, for messages.
        inputs: by argument of forward: names of columns, patterns of names, or `kind:` and a kind of columns.
        row: one preprocessed row.

    Raises:
        ModelError: the row is not flat, a column does not exist or is in no argument, or an argument mixes codes and
            values.
    """
    if not row.columns:
        raise ModelError(
            "model.inputs: the rows are a single tensor or tokens, which forward receives as its only argument; remove inputs"
        )
    found = [_argument(name, [given] if isinstance(given, str) else given, row) for name, given in inputs.items()]
    used = {column.name for argument in found for column in argument.columns}
    if unused := [column.name for column in row.columns if column.name not in used]:
        raise ModelError(
            f"model.inputs: {len(unused)} columns are in no argument of {path}: {', '.join(map(repr, unused[:10]))}; add "
            "them, or leave them out with data.cleaning.drop"
        )
    return found


def _argument(name: str, given: Sequence[str], row: Row) -> Argument:
    columns: dict[str, InputColumn] = {}
    for one in given:
        matched = [column for column in row.columns if _matches(column, one)]
        if not matched:
            hint = did_you_mean(one, [column.name for column in row.columns], "it names no column")
            kinds = ", ".join(f"{KIND}{kind}" for kind in get_args(ColumnKind))
            raise ModelError(f"model.inputs.{name}: the data has no column {one!r}; {hint} (groups: {kinds})")
        columns |= {column.name: column for column in matched}
    kinds_of = {column.kind == "ordinal" for column in columns.values()}
    if len(kinds_of) > 1:
        codes = [column.name for column in columns.values() if column.kind == "ordinal"]
        raise ModelError(
            f"model.inputs.{name}: {codes[0]!r} is ordinal, which is passed as int64, but other columns of the argument are "
            "not; give ordinal columns an argument of their own"
        )
    placed: list[InputColumn] = []
    positions: list[int] = []
    for column in columns.values():
        placed.append(replace(column, start=len(positions)))
        positions += range(column.start, column.start + column.width)
    return Argument(name, tuple(placed), tuple(positions))


def _matches(column: InputColumn, given: str) -> bool:
    return column.name == given or given == f"{KIND}{column.kind}" or fnmatchcase(column.name, given)


def refuse_arguments(path: str, kind: type[nn.Module], names: Sequence[str]) -> None:
    """Refuses names that forward does not have, and parameters of forward that have no columns.

    Raises:
        ModelError: with the nearest name.
    """
    accepted = list(inspect.signature(kind.forward).parameters.values())[1:]
    named = [one.name for one in accepted if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    takes_any = any(one.kind is one.VAR_KEYWORD for one in accepted)
    for name in names:
        if name not in named and not takes_any:
            hint = did_you_mean(name, named, f"its arguments: {', '.join(named) or 'none'}")
            raise ModelError(f"model.inputs: forward of {path} has no argument {name!r}; {hint}")
    for one in accepted:
        if one.name in named and one.name not in names and one.default is inspect.Parameter.empty:
            raise ModelError(f"model.inputs: the argument {one.name!r} of forward of {path} has no columns; add it")


def with_named_inputs(kind: type[nn.Module], arguments: Sequence[Argument]) -> type[nn.Module]:
    """A class derived from `kind` whose forward takes flat rows [N, W]."""

    def forward(self: nn.Module, rows: Tensor) -> Any:
        return kind.forward(self, **{argument.name: argument.take(rows) for argument in arguments})

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "__doc__": kind.__doc__})
