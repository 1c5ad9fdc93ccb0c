"""The overview shows what a training would read, what it would refuse, and columns that contain the target."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from maas_ray.cli.app import app
from maas_ray.data.large import prepare as large
from maas_ray.data.overview.examine import examine
from maas_ray.data.overview.page import write_page
from maas_ray.data.spec.data import DataSpec
from maas_ray.errors import DataError
from tests.data.files import write

EVIL = "<script>alert(1)</script>"


def _table(num_rows: int = 200) -> str:
    rng = np.random.default_rng(0)
    lines = [f"id,x,hp,copy,code,limit,flat,{EVIL},y"]
    for i in range(num_rows):
        label = "ab"[i % 2]
        odd = "?" if i % 20 == 0 else i % 7
        far = 1e6 if i == 3 else rng.normal()
        limit = rng.random() + 10 * (i % 2)
        lines.append(f"{i},{far},{odd},{label},{i % 4},{limit},1,{EVIL if i % 2 else 'plain'},{label}")
    return "\n".join(lines)


def _spec(uri: str, **fields: Any) -> DataSpec:
    return DataSpec.model_validate({"uri": uri, "task": "classification", "target": "y", **fields})


def test_columns_show_their_findings(tmp_path: Path) -> None:
    found = examine(_spec(write(tmp_path / "a.csv", _table())))
    by_name = {one.name: one for one in found.columns}
    assert (found.num_rows, found.is_whole) == (200, True)
    assert by_name["id"].notes == ("identifier: counts the rows",)
    assert "1 outliers" in by_name["x"].notes[-1]
    assert (by_name["hp"].kind, len(found.problems)) == (None, 1)
    assert "data.missing_values" in found.problems[0]
    assert by_name["flat"].notes == ("constant",)
    assert by_name["copy"].leak == "equal to the target"
    assert by_name["code"].leak == "each of its values occurs with one class only"
    assert by_name["limit"].leak == "one threshold separates the classes"
    assert [by_name[name].leak for name in ("id", "x", "flat")] == [None] * 3
    assert found.target_figures is not None
    assert found.target_figures.bars == (("a", 100), ("b", 100))


@pytest.mark.parametrize(("scale", "leak"), [(1.0, "equal to the target"), (-3.0, "a linear function of the target")])
def test_a_number_that_follows_the_target_is_told(tmp_path: Path, scale: float, leak: str) -> None:
    values = np.random.default_rng(1).normal(size=50)
    lines = [f"{scale * value},{other},{value}" for value, other in zip(values, values[::-1], strict=True)]
    path = write(tmp_path / "a.csv", "\n".join(["a,b,y", *lines]))
    found = examine(_spec(path, task="regression"))
    assert [one.leak for one in found.columns] == [leak, None]


def test_ordinary_data_have_no_findings() -> None:
    for name, task in (("iris", "classification"), ("wine", "classification"), ("diabetes", "regression")):
        found = examine(_spec(f"sklearn:{name}", task=task, target="target"))
        assert not found.problems
        assert [one.leak for one in found.columns] == [None] * len(found.columns)


def test_the_first_rows_of_large_data_are_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.csv", _table(3000))
    whole = examine(_spec(path))
    monkeypatch.setattr(large, "LARGE_BYTES", 1000)
    assert examine(_spec(path)) == whole
    monkeypatch.setattr("maas_ray.data.overview.examine.MAX_BYTES", 1000)
    part = examine(_spec(path))
    assert not part.is_whole
    assert 0 < part.num_rows <= 3000


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_has_every_column_and_no_markup_of_the_data(tmp_path: Path) -> None:
    page = write_page(examine(_spec(write(tmp_path / "a.csv", _table()))))
    parser = _Page()
    parser.feed(page)
    assert {"script", "link", "img", "a"} & parser.tags == set()
    assert EVIL in parser.text
    assert re.search("https?://|src=|url\\(", page) is None
    with pytest.raises(AssertionError):
        assert "script" not in _tags(unescape(page))  # the detector finds what escaping prevents


def _tags(page: str) -> set[str]:
    parser = _Page()
    parser.feed(page)
    return parser.tags


def test_text_is_not_a_table() -> None:
    spec = DataSpec.model_validate({"uri": "a.txt", "task": "language_modeling", "text": {"seq_len": 8}})
    with pytest.raises(DataError, match="has no columns"):
        examine(spec)


def test_the_command_fails_where_a_training_would(tmp_path: Path) -> None:
    data = {"uri": write(tmp_path / "a.csv", _table()), "task": "classification", "target": "y"}
    spec = write(tmp_path / "spec.yaml", json.dumps({"run": "r", "model": {"name": "mlp"}, "data": data}))
    html = tmp_path / "page.html"
    refused = CliRunner().invoke(app, ["data", spec, "--json", "--html", str(html)])
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["problems"]
    assert "refuses this data" in html.read_text()
    shown = CliRunner().invoke(app, ["data", spec, "--set", 'data.missing_values=["?"]'], env={"COLUMNS": "300"})
    assert shown.exit_code == 0, shown.stderr
    assert "may contain the target" in shown.stdout
