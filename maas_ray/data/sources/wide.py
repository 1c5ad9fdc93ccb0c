"""Columns of float64 in a cast table: how each becomes float32 numbers, noted in its field."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from maas_ray.data.sources.dates import calendar
from maas_ray.data.spec.features import DATE_PARTS, Column, DateEncoding

_OFFSET, _ENCODING = b"maas_ray.offset", b"maas_ray.date"


@dataclass(frozen=True)
class Narrowing:
    """How float64 values become float32: `value - offset`, or the numbers of a date from the origin `offset`."""

    offset: float
    encoding: DateEncoding | None = None
    """None: numbers, not dates."""

    @property
    def width(self) -> int:
        """Float32 numbers per value."""
        return 1 if self.encoding is None else len(DATE_PARTS[self.encoding])

    def apply(self, xp: Any, values: Any) -> Any:
        """Float32 [N, width] of float64 [N, 1], both arrays of `xp`: numpy or torch."""
        # A Python number would become a float32 constant in an exported graph.
        offset = self.offset if xp is np else xp.tensor(self.offset, dtype=xp.float64)
        if self.encoding is not None:
            return calendar(xp, values, self.encoding, offset)
        near = values - offset
        return near.astype(np.float32) if xp is np else near.to(xp.float32)


def offset_field(name: str, offset: float) -> pa.Field:
    """The field of numbers near `offset`."""
    return pa.field(name, pa.float64(), metadata={_OFFSET: repr(offset).encode()})


def date_field(name: str, encoding: DateEncoding, origin: float) -> pa.Field:
    """The field of dates."""
    return pa.field(name, pa.float64(), metadata={_ENCODING: encoding.encode(), _OFFSET: repr(origin).encode()})


def narrowing_in(field: pa.Field) -> Narrowing | None:
    """The narrowing noted in a field, or None."""
    noted = field.metadata or {}
    if _OFFSET not in noted:
        return None
    encoding: Any = noted[_ENCODING].decode() if _ENCODING in noted else None
    return Narrowing(float(noted[_OFFSET]), encoding)


def narrowing_of(column: Column) -> Narrowing | None:
    """The narrowing of a fitted column, or None."""
    if column.kind == "date":
        return Narrowing(column.origin, column.encoding)
    return Narrowing(column.offset) if column.kind == "numeric" and column.offset is not None else None
