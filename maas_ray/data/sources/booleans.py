"""Columns of booleans: numbers in a cast table, noted in their field, so that the endpoint can take true and false."""

import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.spec.reader import TRUTH

_BOOLEAN = b"maas_ray.boolean"


def count_truth(column: pa.ChunkedArray) -> int:
    """The number of texts that are true or false, in any case."""
    words = pc.utf8_lower(pc.utf8_trim_whitespace(column))
    return int(pc.sum(pc.is_in(words, value_set=pa.array(list(TRUTH)), skip_nulls=True)).as_py() or 0)


def boolean_field(name: str) -> pa.Field:
    """The field of booleans, 1 or 0 (NaN is missing)."""
    return pa.field(name, pa.float32(), metadata={_BOOLEAN: b"1"})


def is_boolean(field: pa.Field) -> bool:
    """Whether a field of a cast table is one of `boolean_field`."""
    return _BOOLEAN in (field.metadata or {})
