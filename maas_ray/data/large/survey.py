"""Surveys a large table: the rows of each unit, and the properties that decide the kinds of its columns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from maas_ray.data.large.tasks import run_tasks
from maas_ray.data.large.units import UnitSource, in_order, read_blocks, unite_schemas, with_types
from maas_ray.data.sources.cast import Cast, CastLimits, choose_cast
from maas_ray.data.sources.number_text import read_numbers
from maas_ray.data.sources.survey import Survey, needs_survey, survey_column
from maas_ray.data.sources.text import are_whole, decode_column
from maas_ray.data.spec.cleaning import ColumnPolicy
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.table.refusals import Refusals
from maas_ray.errors import DataError


@dataclass(frozen=True)
class Kinds:
    """The cast of every column."""

    columns: Mapping[str, Cast]
    """The features, in order."""
    is_whole_target: bool
    """Classes that are floating-point numbers are written without a fraction."""
    target_examples: tuple[str, ...] = ()
    """The first values of the target that are not convertible to numbers."""


def survey_source(source: UnitSource, cpu_timeout_s: float) -> tuple[UnitSource, Kinds]:
    """Reads the data that decide the casts; reads nothing if all files are parquet with only numeric columns.

    Raises:
        DataError: the files cannot be read or do not fit together.
        ClusterError: a task could not run.
    """
    if source.schema is None:
        arguments = {"source": source}
        answers = run_tasks(
            read_schema, len(source.units), arguments, "the types of the columns", cpu_timeout_s, source.name_of
        )
        schemas = {
            number: pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(text)))
            for number, text in answers
            if text is not None
        }
        if not schemas:
            raise DataError(f"{source.spec.uri} has columns but no rows")
        source = with_types(source, [schemas[number] for number in sorted(schemas)])
    merged = {name: Survey() for name in source.names}
    if source.num_rows is None or any(_is_open(source, name) for name in source.names):
        rows = [0] * len(source.units)
        surveys: dict[int, dict[str, Survey]] = {}
        answers = run_tasks(
            survey_unit, len(source.units), {"source": source}, "the survey of the data", cpu_timeout_s, source.name_of
        )
        for number, answer in answers:
            rows[number] = answer["num_rows"]
            surveys[number] = {name: Survey.parsed(found) for name, found in answer["columns"].items()}
        for number in sorted(surveys):  # tasks end in any order
            for name, found in surveys[number].items():
                merged[name] = merged[name].merged(found)
        source = _counted(source, rows)
    limits = CastLimits(source.spec.max_unconvertible, source.spec.max_numbers_in_text)
    columns, refusals = {}, Refusals()
    for name in feature_names(source):
        with refusals.collect():
            columns[name] = choose_cast(
                source.field(name),
                merged[name],
                _policy(source.spec, name),
                source.is_typed,
                source.spec.reader,
                limits,
            )
    refusals.refuse()
    target = merged[source.spec.target]
    return source, Kinds(columns, target.is_whole, target.failed)


def feature_names(source: UnitSource) -> list[str]:
    """The feature columns."""
    return list(source.names[: source.names.index(source.spec.target)])


def read_schema(number: int, source: UnitSource) -> str | None:
    """The columns and types of one unit, as hexadecimal text; None: it has no rows."""
    schemas = [block.schema for block in read_blocks(source, number)]
    if not schemas:
        return None
    united: bytes = unite_schemas(source.spec, in_order(schemas)).serialize().to_pybytes()
    return united.hex()


def survey_unit(number: int, source: UnitSource) -> dict[str, Any]:
    """The number of rows of one unit and the surveys of its columns."""
    merged = {name: Survey() for name in source.names if _is_open(source, name)}
    num_rows = 0
    for block in read_blocks(source, number):
        num_rows += block.num_rows
        for name in merged:
            merged[name] = merged[name].merged(_survey(source, name, block.column(name)))
    return {"num_rows": num_rows, "columns": {name: asdict(found) for name, found in merged.items()}}


def _is_open(source: UnitSource, name: str) -> bool:
    """Whether the column's cast depends on its values."""
    if name == source.spec.target:
        kind = source.field(name).type
        if source.spec.task == "regression":
            return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_dictionary(kind))
        return bool(pa.types.is_floating(kind) or pa.types.is_dictionary(kind))
    return name in feature_names(source) and needs_survey(source.field(name), _policy(source.spec, name).cast)


def _survey(source: UnitSource, name: str, column: pa.ChunkedArray) -> Survey:
    if name != source.spec.target:
        own, reader = _policy(source.spec, name), source.spec.reader
        return survey_column(source.field(name), column, own.cast, reader, own.date_format)
    values = decode_column(name, column)
    if source.spec.task == "regression" and pa.types.is_string(values.type):
        return Survey(failed=read_numbers(values, source.spec.reader).examples)
    return Survey(is_whole=not pa.types.is_floating(values.type) or are_whole(values))


def _policy(spec: DataSpec, name: str) -> ColumnPolicy:
    return spec.cleaning.columns.get(name, ColumnPolicy())


def _counted(source: UnitSource, rows: list[int]) -> UnitSource:
    if not sum(rows):
        raise DataError(f"{source.spec.uri} has columns but no rows")
    return replace(source, num_rows=tuple(rows))
