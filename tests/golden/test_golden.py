"""The public surfaces are those of the files beside this test, which are written again with UPDATE_GOLDEN=1.

Descriptions are left out: they may change, and the pages of docs/reference, which a test compares too, contain them.
"""

import difflib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.pages import generator

HERE = Path(__file__).parent
GENERATE = generator()


def _schema(kind: str) -> Any:
    return _without_descriptions(GENERATE.schemas()[kind])


def _without_descriptions(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_descriptions(inner)
            for key, inner in value.items()
            if not (key == "description" and isinstance(inner, str))
        }
    return [_without_descriptions(inner) for inner in value] if isinstance(value, list) else value


def _commands() -> Any:
    return {
        name: {
            " ".join(row["names"]): {key: value for key, value in row.items() if key not in ("names", "help")}
            for row in GENERATE.parameters(function)
        }
        for name, function, _ in GENERATE.commands()
    }


def _errors() -> Any:
    return {
        code: {"http_status": status, "retryable": is_retryable}
        for code, status, is_retryable, _ in GENERATE.error_rows()
    }


SURFACES: dict[str, Callable[[], Any]] = {
    "train.schema.json": lambda: _schema("train"),
    "tune.schema.json": lambda: _schema("tune"),
    "serve.schema.json": lambda: _schema("serve"),
    "commands.json": _commands,
    "errors.json": _errors,
}


@pytest.mark.parametrize("name", SURFACES)
def test_a_public_surface_has_not_changed(name: str) -> None:
    path, text = HERE / name, json.dumps(SURFACES[name](), indent=1, ensure_ascii=False) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(text)
    known = path.read_text() if path.exists() else ""
    difference = "\n".join(difflib.unified_diff(known.splitlines(), text.splitlines(), name, "the code", lineterm=""))
    if difference:
        pytest.fail(f"{difference}\nif this is intended: UPDATE_GOLDEN=1 pytest -n0 tests/golden", pytrace=False)


def test_there_is_no_file_of_another_surface() -> None:
    assert {path.name for path in HERE.glob("*.json")} == set(SURFACES)
