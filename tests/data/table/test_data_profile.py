"""Nothing is dropped or cast silently: a ledger compares the file with the data set and what its profile says."""

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from maas_ray.data.large import prepare as large
from maas_ray.data.prepare import prepare
from maas_ray.data.spec.data import DataSpec
from maas_ray.data.stored.dataset import Dataset
from maas_ray.data.table.data_profile import MAX_LINES, data_lines, profile_lines
from maas_ray.errors import DataError
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from tests.data.files import write

pytestmark = pytest.mark.usefixtures("ray_cluster")


def _spec(uri: str, **fields: Any) -> DataSpec:
    return parse_spec(DataSpec, {"uri": uri, "task": "classification", "target": "y", **fields})


def _mixed(num_rows: int = 120) -> str:
    lines = [",hp,zip,day,id,city,y"]
    for i in range(num_rows):
        power = "?" if i == 7 else 90 + i % 50
        label = "" if i == 11 else "ab"[i % 2]
        lines.append(
            f"{i},{power},{i % 9:05d},2024-0{1 + i % 9}-1{i % 9},{10**11 + i * 3},{'Rome' if i % 3 else 'Oslo'},{label}"
        )
    return "\n".join(lines)


CLEANING = {
    "numeric": {"missing": "median"},
    "columns": {"hp": {"cast": "number"}, "day": {"cast": "date"}, "city": {"cast": "category"}},
}


def _silent(text: str, dataset: Dataset) -> list[str]:
    """Everything that the profile does not tell about the reading of a csv file."""
    header, *rows = csv.reader(io.StringIO(text))
    assert dataset.profile is not None
    lines, found = profile_lines(dataset.profile), []
    if len(rows) != dataset.profile["rows_read"]:
        found.append("rows that were not read")
    if dataset.profile["rows_read"] != sum(dataset.num_rows.values()) + sum(dataset.profile["rows_dropped"].values()):
        found.append("rows that were dropped")
    told = "\n".join(lines)
    columns = {column.name: column for column in dataset.features.columns}
    for place, name in enumerate(header):
        values = {row[place] for row in rows}
        if name == "y":
            continue
        if name not in columns:
            found += [] if f"left out {name or 'a column without a name'}" in told else [f"column {name} left out"]
        elif any(not _is_plain(value) for value in values) or len(np.unique(_float32(values))) < len(values):
            about = dataset.profile["columns"][name]
            is_told = about["reason"] == "cast: category" or f"column {name}:" in told
            found += [] if is_told else [f"column {name} was cast"]
    return found


def _is_plain(text: str) -> bool:
    try:
        return str(float(text)) == text or str(int(text)) == text
    except ValueError:
        return False


def _float32(texts: set[str]) -> np.ndarray:
    return np.array([float(text) if _is_plain(text) else np.nan for text in texts], np.float32)


def test_the_profile_tells_everything_and_the_ledger_catches_what_it_does_not(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = _mixed()
    spec = _spec(write(tmp_path / "a.csv", text), cleaning=CLEANING)
    dataset = prepare(spec, file_store)
    assert _silent(text, dataset) == []
    profile = dict(dataset.profile or {})
    assert profile["columns"]["hp"]["examples"] == ["?"]
    lines = profile_lines(profile)
    assert lines[0] == "120 rows read, 1 without a target dropped"
    assert "column hp: numeric (cast: number); 1 values not convertible, such as '?'" in lines
    assert any(line.startswith("classes of ") for line in lines)
    # Planted faults: a row that was lost, a cast and a column that nobody was told of.
    fewer = {**dataset.num_rows, "train": dataset.num_rows["train"] - 1}
    assert _silent(text, replace(dataset, num_rows=fewer)) == ["rows that were dropped"]
    for name in ("hp", "zip", "day", "id"):
        about = {**profile["columns"][name], "kind": "numeric", "unconvertible": 0, "missing": 0, "notes": []}
        quiet = {**profile, "columns": {**profile["columns"], name: about}}
        assert _silent(text, replace(dataset, profile=quiet)) == [f"column {name} was cast"]
    assert _silent(text, replace(dataset, profile={**profile, "left_out": {}})) == ["column  left out"]
    monkeypatch.setattr(large, "LARGE_BYTES", 100)
    sharded = prepare(spec, file_store)
    assert sharded.shards is not None
    assert (sharded.profile, sharded.features, sharded.report) == (profile, dataset.features, dataset.report)
    for split in ("train", "test"):
        for one, two in zip(dataset.read(split).columns, sharded.read(split).columns, strict=True):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)


THOUSANDS = "\n".join(["a,y", *(f'{i},"{i * 40:,}"' for i in range(60))])
UNIQUE = "\n".join(["name,y", *(f"P. {i},{'ab'[i % 2]}" for i in range(60))])
DROPPED = "\n".join(["a,y", *(f"{i},{'' if i % 3 else 'ab'[i % 2]}" for i in range(60))])
ODD = "\n".join(["hp,y", *(f"{'?' if i % 20 == 0 else i},{'ab'[i % 2]}" for i in range(60))])


@pytest.mark.parametrize("is_large", [False, True], ids=["in memory", "in tasks"])
@pytest.mark.parametrize(
    ("text", "fields", "says"),
    [
        (THOUSANDS, {"task": "regression"}, r"the target 'y': 35 of 60 values are not numbers.*data.thousands: ','"),
        (UNIQUE, {}, r"column 'name' has \d+ categories in \d+ rows .*cleaning.drop"),
        (DROPPED, {}, r"40 of 60 rows .* would be dropped: 40 without a value.*data.max_dropped"),
        (ODD, {}, r"column 'hp': 3 of 60 values are not numbers.*data.missing_values"),
    ],
    ids=["thousands", "unique", "dropped", "odd"],
)
def test_too_large_losses_are_refused_with_the_way_out(
    file_store: ObstoreStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_large: bool,
    text: str,
    fields: dict[str, Any],
    says: str,
) -> None:
    if is_large:
        monkeypatch.setattr(large, "LARGE_BYTES", 100)
    with pytest.raises(DataError, match=says):
        prepare(_spec(write(tmp_path / "a.csv", text), **fields), file_store)


def test_many_lines_are_cut() -> None:
    profile = {
        "rows_read": 3,
        "rows_dropped": {"target_missing": 0, "value_missing": 0},
        "target": {"missing": 0, "unconvertible": 0, "examples": [], "classes": {}},
        "columns": {},
        "left_out": {f"c{i}": "cleaning.drop" for i in range(50)},
    }
    lines = data_lines(profile, {})
    assert (len(lines), lines[-1]) == (MAX_LINES, "and 40 more lines in report.json")
    assert data_lines(None, {"rows_read": 5, "rows_dropped": {"target_missing": 1}}) == ["5 rows read, 1 dropped"]
