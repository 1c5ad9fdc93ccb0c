"""The contract with Ray: the installed version fulfills it, changes are reported, and all private names are listed."""

import ast
import tomllib
from typing import Any

import pytest

from maas_ray.ray_internals.contract import CONTRACT, READ_IN, check
from maas_ray.ray_internals.symbol import there
from tests.support.root import ROOT
from tests.test_imports import private_names

INTERNALS = ROOT / "maas_ray" / "ray_internals"


def test_the_installed_version_fulfills_the_contract() -> None:
    assert check() == []


def test_the_contract_is_of_the_required_version() -> None:
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[serve,train]=={READ_IN}" in asked


def _without_flag(key: str, value: str, *, namespace: str | None = None) -> None:
    """Ray's `_internal_kv_put` without `overwrite`."""


@pytest.mark.parametrize(
    ("module", "attribute", "planted", "problem"),
    [
        ("ray.experimental.internal_kv", "_internal_kv_list", None, "does not exist"),
        (
            "ray.experimental.internal_kv",
            "_internal_kv_put",
            _without_flag,
            "has parameters (key, value, namespace), expected (key, value, overwrite, namespace)",
        ),
        ("ray.serve._private.constants", "DEFAULT_GRPC_SERVER_OPTIONS", (), "is tuple, expected list"),
        ("ray.serve._private.constants", "SERVE_NAMESPACE", None, "does not exist"),
        ("ray.serve", "delete", lambda name: None, "has no parameter _blocking"),
        ("ray.serve._private.proxy", "HTTPProxy", object, "has no attribute proxy_router"),
        (
            "ray.serve._private.deployment_state",
            "DeploymentTargetState",
            object,
            "has no attribute version, target_num_replicas",
        ),
    ],
)
def test_an_injected_change_is_reported(
    module: str, attribute: str, planted: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if planted is None:
        monkeypatch.delattr(f"{module}.{attribute}")
    else:
        monkeypatch.setattr(f"{module}.{attribute}", planted)
    (broken,) = check()
    assert broken.name == f"{module}.{attribute}"
    assert broken.problem.startswith(problem)
    assert broken.why == next(symbol.why for symbol in CONTRACT if symbol.name == broken.name)


def test_a_missing_module_is_reported() -> None:
    (broken,) = check([there("ray._private.no_such_part", "x", "a test")])
    assert broken.problem == "cannot be imported: ModuleNotFoundError: No module named 'ray._private.no_such_part'"


def test_no_private_name_is_imported_without_a_line_in_the_contract() -> None:
    known = {symbol.module for symbol in CONTRACT} | {
        f"{symbol.module}.{symbol.path.partition('.')[0]}" for symbol in CONTRACT
    }
    imported = {
        f"{node.module}.{alias.name}"
        for path in INTERNALS.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if private_names(ast.unparse(ast.ImportFrom(node.module, [ast.alias(alias.name)], 0)))
    }
    assert len(imported) > 30
    assert imported - known == set()
