"""A split in the order of a column's values: the last rows are held out. Independent of how rows are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from maas_ray.data.spec.split import SPLITS, SplitSpec
from maas_ray.errors import DataError

UNUSED = -1
"""The code of a row in no split: it is later than the fold's test split."""
TRAIN, VALIDATION, TEST = (SPLITS.index(name) for name in ("train", "validation", "test"))
OrderKind = Literal["integer", "number", "time"]


@dataclass(frozen=True)
class OrderRule:
    """The last rows are held out; rows with equal values are in one split."""

    name: str
    kind: OrderKind
    starts: tuple[Any, Any, Any]
    """The first value of validation, of test and after the test split; None: none of these splits, or no end."""

    @classmethod
    def of(cls, spec: SplitSpec, name: str, counts: Mapping[str, int]) -> "OrderRule":
        """See `make_rule`."""
        if "" in counts:
            raise DataError(f"data.split.order_by: {counts['']} rows have no value in {name!r}; remove or fill them")
        kind, values = _order_values(name, pa.array(list(counts), pa.string()))
        order = np.argsort(values, kind="stable")
        values, sizes = values[order], np.array(list(counts.values()), dtype=np.int64)[order]
        ends = np.cumsum(sizes)
        num_rows = int(ends[-1])
        if spec.fold is None:
            test_rows, stop = spec.test * num_rows, num_rows
        else:
            block = num_rows / (spec.fold.of + 1)
            stop = round(block * (spec.fold.index + 2))
            test_rows = stop - block * (spec.fold.index + 1)
        # Indices of distinct values at which test, validation and what is after the test split begin.
        last = len(values) if stop >= num_rows else _nearest(ends, stop, 1, len(values))
        first_test = _nearest(ends, int(ends[last - 1]) - test_rows, 0, last - 1) if test_rows else last
        first_validation = first_test
        if spec.validation:
            before = int(ends[first_test - 1]) if first_test else 0
            first_validation = _nearest(ends, before - spec.validation * num_rows, 0, first_test - 1)
        if first_validation < 1:
            raise DataError(
                f"data.split.order_by: {name!r} has {len(values)} distinct values, too few to hold out the last rows "
                "without dividing rows with equal values; choose a finer column, or change data.split"
            )

        def value_at(place: int, is_there: bool) -> Any:
            return values[place].item() if is_there and place < len(values) else None

        return cls(
            name,
            kind,
            (
                value_at(first_validation, bool(spec.validation)),
                value_at(first_test, bool(test_rows)),
                value_at(last, True),
            ),
        )

    def assign(self, keys: pa.Array, before: Mapping[str, int]) -> NDArray[np.int8]:
        _, values = _order_values(self.name, keys, self.kind)
        result = np.full(len(values), TRAIN, dtype=np.int8)
        for start, code in zip(self.starts, (VALIDATION, TEST, UNUSED), strict=True):
            if start is not None:
                result[values >= start] = code
        return result


def _nearest(ends: NDArray[np.int64], rows: float, low: int, high: int) -> int:
    """The number of leading values, in [low, high], that have about `rows` rows."""
    starts = np.concatenate([[0], ends])[max(low, 0) : max(high, 0) + 1]
    return max(low, 0) + int(np.argmin(np.abs(starts - rows)))


def _order_values(name: str, texts: pa.Array, kind: OrderKind | None = None) -> tuple[OrderKind, NDArray[Any]]:
    """Texts as integers, numbers or times in microseconds, whichever first fits all of them."""
    kinds: dict[OrderKind, list[pa.DataType]] = {
        "integer": [pa.int64()],
        "number": [pa.float64()],
        "time": [pa.timestamp("us"), pa.timestamp("us", tz="UTC")],
    }
    trimmed = pc.utf8_trim_whitespace(texts)
    for one in [kind] if kind is not None else kinds:
        for wanted in kinds[one]:
            try:
                found = trimmed.cast(wanted)
            except pa.ArrowInvalid:
                continue
            values = (found.cast(pa.int64()) if one == "time" else found).to_numpy(zero_copy_only=False)
            if np.isfinite(values).all():
                return one, values
    raise DataError(
        f"data.split.order_by: {name!r} contains values that are neither numbers nor dates and times as in "
        "2024-01-31 or 2024-01-31T12:00:00; convert the column"
    )
