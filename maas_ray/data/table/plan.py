"""Resolves the user's cleaning policies into a plan for each column, according to its kind."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from maas_ray.data.sources.arrays import tensor_shape
from maas_ray.data.sources.booleans import is_boolean
from maas_ray.data.sources.cast import Kind
from maas_ray.data.sources.wide import Narrowing, narrowing_in
from maas_ray.data.spec.cleaning import (
    CategoricalPolicy,
    CleaningSpec,
    ColumnPolicy,
    Encoding,
    Missing,
    NumericPolicy,
    Scaling,
    TensorPolicy,
    Unknown,
)
from maas_ray.data.spec.features import DATE_PARTS
from maas_ray.errors import DataError

_ALLOWED: dict[Kind, tuple[str, ...]] = {
    "numeric": ("error", "mean", "median", "most_frequent", "constant", "drop_row"),
    "categorical": ("error", "most_frequent", "constant", "drop_row"),
    "tensor": ("error", "mean", "constant", "drop_row"),
    "date": ("error", "mean", "drop_row"),
}


@dataclass(frozen=True)
class ColumnPlan:
    """The resolved policy of one column; fields that its kind does not use keep their defaults."""

    name: str
    kind: Kind
    missing: Missing
    constant: Any = None
    scaling: Scaling = "none"
    encoding: Encoding = "one_hot"
    unknown: Unknown = "zeros"
    is_integer: bool = False
    """Whether the categories are integers on the wire."""
    is_bytes: bool = False
    """Whether the tensor is uint8."""
    shape: tuple[int, ...] = ()
    """Shape of a tensor."""
    narrowing: Narrowing | None = None
    """How float64 values become float32; None: the column is not float64."""
    is_boolean: bool = False
    """Whether the numbers are booleans."""

    @property
    def is_per_element(self) -> bool:
        """Whether each element of a tensor, or each number of a date, has its own shift and scale."""
        return self.kind == "date" or len(self.shape) == 1


def plan_column(spec: CleaningSpec, kind: Kind, field: pa.Field) -> ColumnPlan:
    """Resolves the policies of one column.

    Args:
        spec: the user's policies.
        kind: kind of the column after the cast.
        field: field of the column after the cast.

    Raises:
        DataError: the column's kind does not have the policy.
    """
    name = field.name
    defaults: dict[Kind, NumericPolicy | CategoricalPolicy | TensorPolicy]
    defaults = {
        "numeric": spec.numeric,
        "date": spec.numeric,
        "categorical": spec.categorical,
        "tensor": spec.tensor,
    }
    default = defaults[kind]
    own = spec.columns.get(name, ColumnPolicy())
    missing = own.missing or default.missing
    constant = own.constant if own.missing else default.constant
    if kind == "date" and not own.missing and missing not in _ALLOWED["date"]:
        missing = "mean"  # of each number of the date; the default of numbers need not fit
    where = f"cleaning.columns.{name}"
    if missing not in _ALLOWED[kind]:
        raise DataError(f"{where}.missing: {missing!r} does not fit a {kind} column; use {', '.join(_ALLOWED[kind])}")
    if own.scaling if kind == "categorical" else (own.encoding and kind != "date") or own.unknown:
        unused = "scaling" if kind == "categorical" else "encoding" if own.encoding and kind != "date" else "unknown"
        raise DataError(f"{where}.{unused} does not fit a {kind} column; remove it")
    if missing == "constant":
        constant = _constant(where, kind, constant)
    shape = tensor_shape(field) or ()
    is_bytes = kind == "tensor" and pa.types.is_uint8(field.type.value_type)
    scaling: Scaling = "none" if isinstance(default, CategoricalPolicy) else own.scaling or default.scaling
    if kind in ("date", "categorical") and own.encoding and (own.encoding in DATE_PARTS) != (kind == "date"):
        raise DataError(f"{where}.encoding: {own.encoding!r} does not fit a {kind} column; remove it")
    encoding: Any = own.encoding or spec.categorical.encoding
    is_integer = kind == "categorical" and pa.types.is_integer(field.type)
    unknown = own.unknown or spec.categorical.unknown
    narrowing = narrowing_in(field)
    return ColumnPlan(
        name,
        kind,
        missing,
        constant,
        scaling,
        encoding,
        unknown,
        is_integer,
        is_bytes,
        shape,
        narrowing,
        is_boolean(field),
    )


def _constant(where: str, kind: Kind, value: Any) -> float | str:
    if kind == "categorical":
        if str(value) == "":
            raise DataError(f"{where}.constant must not be empty: an empty text means a missing value")
        return str(value)
    try:
        return float(value)
    except ValueError:
        raise DataError(f"{where}.constant: {value!r} is not a number, but the column is {kind}") from None
