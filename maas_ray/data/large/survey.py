"""Surveys a large table: the rows of each unit, and the properties that decide the kinds of its columns."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import pyarrow as pa

from maas_ray.data.large.tasks import run_tasks
from maas_ray.data.large.units import UnitSource, in_order, read_blocks, unite_schemas, with_types
from maas_ray.data.sources.cast import Cast, Survey, are_whole, choose_cast, decode_column, needs_survey, survey_column
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError


@dataclass(frozen=True)
class Kinds:
    """The cast of every column."""

    columns: Mapping[str, Cast]
    """The features, in order."""
    is_whole_target: bool
    """Classes that are floating-point numbers are written without a fraction."""


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
        answers = run_tasks(
            survey_unit, len(source.units), {"source": source}, "the survey of the data", cpu_timeout_s, source.name_of
        )
        for number, answer in answers:
            rows[number] = answer["num_rows"]
            for name, found in answer["columns"].items():
                merged[name] = merged[name].merged(Survey(**found))
        source = _counted(source, rows)
    columns = {
        name: choose_cast(source.field(name), merged[name], _cast_to(source.spec, name), source.is_typed)
        for name in feature_names(source)
    }
    return source, Kinds(columns, merged[source.spec.target].is_whole)


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
        return source.spec.task != "regression" and (pa.types.is_floating(kind) or pa.types.is_dictionary(kind))
    return name in feature_names(source) and needs_survey(source.field(name), _cast_to(source.spec, name))


def _survey(source: UnitSource, name: str, column: pa.ChunkedArray) -> Survey:
    if name != source.spec.target:
        return survey_column(source.field(name), column, _cast_to(source.spec, name))
    values = decode_column(name, column)
    return Survey(is_whole=not pa.types.is_floating(values.type) or are_whole(values))


def _cast_to(spec: DataSpec, name: str) -> str | None:
    own = spec.cleaning.columns.get(name)
    return own.cast if own else None


def _counted(source: UnitSource, rows: list[int]) -> UnitSource:
    if not sum(rows):
        raise DataError(f"{source.spec.uri} has columns but no rows")
    return replace(source, num_rows=tuple(rows))
