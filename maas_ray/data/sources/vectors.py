"""Makes vectors of lists: a column whose lists all have one length is a tensor per row. Independent of files."""

import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.sources.arrays import tensor_shape
from maas_ray.errors import DataError


def is_list(kind: pa.DataType) -> bool:
    """Whether a type is a list of any length."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def vectors_in(table: pa.Table, where: str) -> pa.Table:
    """The table with its lists as fixed-size lists.

    Args:
        table: rows of a file, or a part of them.
        where: path of the file.

    Raises:
        DataError: the lists of a column have different lengths, or one is missing.
    """
    for place, field in enumerate(table.schema):
        if not is_list(field.type) or tensor_shape(field) is not None or not table.num_rows:
            continue
        column = table.column(place)
        if column.null_count:
            raise DataError(f"{where}: column {field.name!r} has {column.null_count} rows without a list; remove them")
        lengths = pc.list_value_length(column)
        low, high = pc.min(lengths).as_py(), pc.max(lengths).as_py()
        if low != high or not high:
            raise DataError(
                f"{where}: the lists of column {field.name!r} have {low} to {high} values; a vector has the same number, "
                "at least one, in every row; pad them, or leave the column out with cleaning.drop"
            )
        kind = pa.list_(field.type.value_type, high)
        chunks = [pa.FixedSizeListArray.from_arrays(pc.list_flatten(chunk), high) for chunk in column.chunks]
        table = table.set_column(place, pa.field(field.name, kind), pa.chunked_array(chunks, kind))
    return table
