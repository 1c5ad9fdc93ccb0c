"""The torch module that turns encoded columns into the model's input, in training and in the exported graph.

The formulas are documented in `spec/features.py`; every fitted value comes from there, nothing is learned here.
"""

import torch
from torch import Tensor, nn

from maas_ray.data.spec.features import (
    CategoricalColumn,
    Column,
    DateColumn,
    Features,
    NumericColumn,
    TensorColumn,
    column_width,
)
from maas_ray.errors import DataError


class Preprocess(nn.Module):
    """Fills, scales and encodes all columns and concatenates them in order.

    Columns of one kind are computed together and then reordered, so that dozens of columns cost a few operations.

    Args:
        features: the fitted features.
    """

    order: Tensor

    def __init__(self, features: Features) -> None:
        super().__init__()
        self._num_columns = len(features.columns)
        self._is_flat = not (self._num_columns == 1 and features.columns[0].kind == "tensor")
        members: dict[str, list[int]] = {}
        for i, column in enumerate(features.columns):
            members.setdefault(_group(column), []).append(i)
        self._members = list(members.values())
        self.groups = nn.ModuleList(_build([features.columns[i] for i in places]) for places in self._members)
        order = _order(features, self._members)
        self._is_ordered = order == sorted(order)
        _buffer(self, "order", torch.tensor(order, dtype=torch.int64))

    def forward(self, *columns: Tensor) -> Tensor:
        """Computes the model's input.

        Args:
            *columns: encoded columns in the order of the features: numeric float32 [N, 1] (NaN is missing), dates
                float32 [N, k], categorical int64 [N, 1], tensors float32 or uint8 [N, *shape]; or tokens of any integer type [N, T].

        Returns:
            float32 [N, *features.row.shape], or the tokens as int64 [N, T].

        Raises:
            DataError: the number of columns is not the number of features.
        """
        if len(columns) != self._num_columns:
            raise DataError(f"got {len(columns)} columns; expected {self._num_columns}, one per feature")
        parts = []
        for places, group in zip(self._members, self.groups, strict=True):
            part = group(*[columns[i] for i in places])
            parts.append(part.flatten(1) if self._is_flat else part)
        joined = _join(parts)
        return joined if self._is_ordered else joined.index_select(1, self.order)


def _order(features: Features, members: list[list[int]]) -> list[int]:
    """For each output element, in the order of the columns, its index after the groups are concatenated."""
    starts = {}
    position = 0
    for i in (i for places in members for i in places):
        starts[i] = position
        position += column_width(features.columns[i])
    return [starts[i] + k for i, column in enumerate(features.columns) for k in range(column_width(column))]


class _Numeric(nn.Module):
    fill: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, columns: list[NumericColumn]) -> None:
        super().__init__()
        fills = [float("nan") if column.fill is None else column.fill for column in columns]
        _buffer(self, "fill", torch.tensor(fills, dtype=torch.float32))
        _buffer(self, "shift", torch.tensor([column.shift for column in columns], dtype=torch.float32))
        _buffer(self, "scale", torch.tensor([column.scale for column in columns], dtype=torch.float32))

    def forward(self, *columns: Tensor) -> Tensor:
        x = _join(columns)
        return (torch.where(torch.isnan(x), self.fill, x) - self.shift) / self.scale


class _OneHot(nn.Module):
    owner: Tensor
    code: Tensor

    def __init__(self, columns: list[CategoricalColumn]) -> None:
        super().__init__()
        pairs = [(i, code) for i, column in enumerate(columns) for code in range(column.cardinality)]
        _buffer(self, "owner", torch.tensor([owner for owner, _ in pairs], dtype=torch.int64))
        _buffer(self, "code", torch.tensor([code for _, code in pairs], dtype=torch.int64))

    def forward(self, *columns: Tensor) -> Tensor:
        return (_join(columns).index_select(1, self.owner) == self.code).to(torch.float32)


class _Ordinal(nn.Module):
    def forward(self, *columns: Tensor) -> Tensor:
        return _join(columns).to(torch.float32)


class _Image(nn.Module):
    shift: Tensor
    scale: Tensor

    def __init__(self, column: TensorColumn) -> None:
        super().__init__()
        self._fill = column.fill
        _buffer(self, "shift", _spread(column.shift, column.shape))
        _buffer(self, "scale", _spread(column.scale, column.shape))

    def forward(self, *columns: Tensor) -> Tensor:
        x = columns[0].to(torch.float32)
        if self._fill is not None:
            x = torch.where(torch.isnan(x), self._fill, x)
        return (x - self.shift) / self.scale


class _Date(nn.Module):
    fill: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, column: DateColumn) -> None:
        super().__init__()
        self._has_fill = column.fill is not None
        _buffer(self, "fill", torch.tensor(column.fill or (), dtype=torch.float32))
        _buffer(self, "shift", torch.tensor(column.shift, dtype=torch.float32))
        _buffer(self, "scale", torch.tensor(column.scale, dtype=torch.float32))

    def forward(self, *columns: Tensor) -> Tensor:
        x = columns[0]
        if self._has_fill:
            x = torch.where(torch.isnan(x), self.fill, x)
        return (x - self.shift) / self.scale


class _Tokens(nn.Module):
    def forward(self, *columns: Tensor) -> Tensor:
        return columns[0].to(torch.int64)


def _group(column: Column) -> str:
    if column.kind == "categorical":
        return column.encoding
    # Tensors and dates differ in shape, so each one is a separate group.
    return column.kind if column.kind == "numeric" else f"{column.kind} {column.name}"


def _build(columns: list[Column]) -> nn.Module:
    """The module for the columns of one group."""
    if columns[0].kind == "tensor":
        return _Image(columns[0])
    if columns[0].kind == "tokens":
        return _Tokens()
    if columns[0].kind == "date":
        return _Date(columns[0])
    if columns[0].kind == "numeric":
        return _Numeric([column for column in columns if column.kind == "numeric"])
    if columns[0].encoding == "ordinal":
        return _Ordinal()
    return _OneHot([column for column in columns if column.kind == "categorical"])


def _join(columns: tuple[Tensor, ...] | list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _spread(values: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
    tensor = torch.tensor(values, dtype=torch.float32)
    return tensor.reshape(shape) if len(values) > 1 else tensor.reshape(())


def _buffer(module: nn.Module, name: str, value: Tensor) -> None:
    # Not persistent: the features are stored as JSON next to the weights, and checkpoints contain only learned state.
    module.register_buffer(name, value, persistent=False)
