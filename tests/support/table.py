"""A real table with gaps and strings as a csv file, and what a run needs to know of it."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_breast_cancer

from tests.support.root import ROOT

TITANIC = ROOT / "shared" / "data" / "titanic.csv"
Row = dict[str, str]


@dataclass(frozen=True)
class Table:
    """What was written, and the `data` of a run that learns it."""

    held_out: Sequence[Row]
    """The rows of the split `test`, as text; an empty one is a gap."""
    file: Path
    """The features of these rows alone, in a csv file: what a user has who wants predictions."""
    data: dict[str, Any]


def write_table(directory: Path) -> Table:
    """Titanic where it is at hand, else a table of scikit-learn's with values taken out."""
    rows, data = _titanic() if TITANIC.exists() else _breast_cancer()
    for number, row in enumerate(rows):
        row["split"] = {0: "test", 1: "validation"}.get(number % 4, "train")
    held_out = [row for row in rows if row["split"] == "test"]
    _write(directory / "rows.csv", rows, [*data["features"], data["target"], "split"])
    _write(directory / "held_out.csv", held_out, data["features"])
    data = {"uri": str(directory / "rows.csv"), "split": {"column": "split"}, **data}
    return Table(held_out, directory / "held_out.csv", data)


def _titanic() -> tuple[list[Row], dict[str, Any]]:
    with TITANIC.open(newline="") as file:
        rows = list(csv.DictReader(file))
    cleaning = {
        "numeric": {"missing": "median"},
        "categorical": {"missing": "most_frequent"},
        "columns": {"deck": {"missing": "constant", "constant": "none"}},
    }
    features = ["pclass", "sex", "age", "sibsp", "fare", "embarked", "deck"]
    return rows, {"target": "survived", "features": features, "task": "binary", "cleaning": cleaning}


def _breast_cancer() -> tuple[list[Row], dict[str, Any]]:
    """A package's real data with a string column made of a number, and values taken out."""
    data = load_breast_cancer()
    names = [name.replace(" ", "_") for name in data.feature_names[:6]]
    generator = np.random.default_rng(0)
    rows = []
    for values, target in zip(data.data, data.target, strict=True):
        row = {name: "" if generator.random() < 0.1 else str(value) for name, value in zip(names, values, strict=False)}
        row["size"] = "" if generator.random() < 0.1 else "large" if values[3] > 600 else "small"
        rows.append({**row, "malignant": str(1 - target)})
    cleaning = {"numeric": {"missing": "mean"}, "categorical": {"missing": "most_frequent"}}
    return rows, {"target": "malignant", "features": [*names, "size"], "task": "binary", "cleaning": cleaning}


def _write(path: Path, rows: Sequence[Row], columns: list[str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
