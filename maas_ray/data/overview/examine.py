"""Examines the columns of a data set as `prepare` would read them, without cleaning or storing anything."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from maas_ray.data.large import prepare as large
from maas_ray.data.large.units import open_source, read_blocks
from maas_ray.data.overview.figures import Figures, category_figures, number_figures
from maas_ray.data.overview.leakage import find_leak
from maas_ray.data.sources.cast import CastColumn, CastLimits, cast_column
from maas_ray.data.sources.files import count_unread, format_of, list_files
from maas_ray.data.sources.table import SKLEARN, RawTable, read_table
from maas_ray.data.spec.cleaning import ColumnPolicy
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.table.report import refuse_dropped
from maas_ray.data.table.target import Target, cast_target
from maas_ray.errors import DataError

MAX_BYTES = 1 << 28
"""Bytes of rows of a large data set that are examined."""
_FEW = 20


@dataclass(frozen=True)
class ColumnOverview:
    """One feature."""

    name: str
    kind: str | None
    """None: the column is refused."""
    reason: str
    """How the kind was decided, or why the column is refused."""
    missing: int = 0
    unconvertible: int = 0
    examples: tuple[str, ...] = ()
    """Some values that are not convertible."""
    figures: Figures | None = None
    notes: tuple[str, ...] = ()
    """Findings: constant, identifier, outliers."""
    leak: str | None = None
    """Why the column may contain the target; None: no sign of it."""


@dataclass(frozen=True)
class Overview:
    """A data set."""

    uri: str
    task: str
    num_rows: int
    is_whole: bool
    """False: only the first rows were examined."""
    columns: tuple[ColumnOverview, ...]
    target: str
    target_missing: int = 0
    target_unconvertible: int = 0
    target_figures: Figures | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """Messages with which a training would refuse the data."""


def examine(spec: DataSpec) -> Overview:
    """Examines a table; a large one by its first rows.

    Args:
        spec: the data spec of a training.

    Raises:
        DataError: the data cannot be read at all, or are not a table.
    """
    if spec.text is not None:
        raise DataError(f"the task {spec.task} reads text, which has no columns; an overview needs a table or images")
    raw, is_whole, unread = _read(spec)
    table, problems, target = raw.table, [], None
    try:
        target = cast_target(spec.target, table.column(spec.target), spec.task, spec.reader)
    except DataError as error:
        problems.append(str(error))
    columns = []
    for name in table.column_names[: table.column_names.index(spec.target)]:
        found = _column(spec, raw, name, target)
        columns.append(found)
        if found.kind is None:
            problems.append(found.reason)
    if target is not None:
        num_missing = int(target.missing.sum())
        report = {
            "rows_read": table.num_rows,
            "rows_dropped": {"target_missing": num_missing, "value_missing": 0},
            "target": {"missing": num_missing - target.num_unconvertible, "unconvertible": target.num_unconvertible},
        }
        try:
            refuse_dropped(spec, report, target.examples)
        except DataError as error:
            problems.append(str(error))
    return Overview(
        uri=spec.uri,
        task=spec.task,
        num_rows=table.num_rows,
        is_whole=is_whole,
        columns=tuple(columns),
        target=spec.target,
        target_missing=0 if target is None else int(target.missing.sum()) - target.num_unconvertible,
        target_unconvertible=0 if target is None else target.num_unconvertible,
        target_figures=_target_figures(spec, target),
        left_out={**dict.fromkeys(spec.cleaning.drop, "cleaning.drop"), **raw.left_out, **unread},
        problems=tuple(problems),
    )


def _read(spec: DataSpec) -> tuple[RawTable, bool, dict[str, str]]:
    """The rows, whether these are all, and the files that are not read."""
    if spec.uri.startswith(SKLEARN):
        return read_table(spec), True, {}
    files = list_files(spec)
    kind = format_of(spec, [file.path for file in files])
    unread = count_unread(spec, files)
    if not large.is_large(files, kind):
        return read_table(spec, [file.path for file in files]), True, unread
    source = open_source(spec, files, kind)
    blocks: list[pa.Table] = []
    num_bytes = 0
    for unit in range(len(source.units)):
        for block in read_blocks(source, unit):
            blocks.append(block.replace_schema_metadata(None))
            num_bytes += block.nbytes
            if num_bytes > MAX_BYTES:
                rows = pa.concat_tables(blocks, promote_options="permissive")
                return RawTable(rows, source.is_typed, source.left_out), False, unread
    rows = pa.concat_tables(blocks, promote_options="permissive")
    return RawTable(rows, source.is_typed, source.left_out), True, unread


def _column(spec: DataSpec, raw: RawTable, name: str, target: Target | None) -> ColumnOverview:
    own = spec.cleaning.columns.get(name, ColumnPolicy())
    limits = CastLimits(spec.max_unconvertible, spec.max_numbers_in_text)
    column = raw.table.column(name)
    try:
        cast, how = cast_column(raw.table.schema.field(name), column, own, raw.is_typed, spec.reader, limits)
    except DataError as error:
        return ColumnOverview(name, None, str(error), column.null_count)
    figures = _figures(cast)
    notes = _notes(cast, figures, how.is_counting, spec)
    leak = find_leak(cast, target.values, target.missing, spec.task) if target is not None else None
    return ColumnOverview(
        name, cast.kind, how.reason, cast.num_missing, cast.num_unconvertible, how.unconvertible, figures, notes, leak
    )


def _figures(cast: CastColumn) -> Figures:
    if cast.kind == "categorical":
        return category_figures(cast.values.filter(pa.array(~cast.missing)))
    values = cast.values.flatten() if cast.kind == "tensor" else cast.values
    numbers = values.to_numpy(zero_copy_only=False).astype(np.float64)
    return number_figures(numbers[~np.isnan(numbers)], is_time=cast.kind == "date")


def _target_figures(spec: DataSpec, target: Target | None) -> Figures | None:
    if target is None:
        return None
    present = target.values.filter(pa.array(~target.missing))
    if spec.task == "regression":
        return number_figures(present.to_numpy(zero_copy_only=False).astype(np.float64))
    return category_figures(present)


def _notes(cast: CastColumn, figures: Figures, is_counting: bool, spec: DataSpec) -> tuple[str, ...]:
    notes, num_present = [], int((~cast.missing).sum())
    if figures.distinct == 1:
        notes.append("constant")
    elif is_counting:
        notes.append("identifier: counts the rows")
    elif cast.kind == "categorical" and figures.distinct > max(_FEW, spec.cleaning.max_distinct * num_present):
        notes.append(
            f"identifier or free text: {figures.distinct} categories in {num_present} rows; training refuses it"
        )
    elif cast.kind == "numeric" and figures.distinct == num_present > _FEW and _are_whole(cast):
        notes.append("may be an identifier: whole numbers, all different")
    if figures.num_outliers and cast.kind == "numeric":
        notes.append(f"{figures.num_outliers} outliers, more than 3 interquartile ranges from the quartiles")
    return tuple(notes)


def _are_whole(cast: CastColumn) -> bool:
    present = pc.drop_null(pc.if_else(pc.is_nan(cast.values), None, cast.values))
    return bool(pc.all(pc.equal(present, pc.floor(present)), min_count=0).as_py())
