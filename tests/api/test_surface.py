"""The public names of `maas_ray` and their signatures: they change only on purpose."""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import maas_ray
from tests.support.root import ROOT

GOLDEN = ROOT / "tests" / "golden" / "python_api.txt"


def surface() -> list[str]:
    """One line per public name, method and property."""
    lines = []
    for name in maas_ray.__all__:
        value = getattr(maas_ray, name)
        if inspect.isclass(value):
            lines.append(f"class {name}{_signature(value)}")
            members = [
                (member, each) for member, each in inspect.getmembers_static(value) if not member.startswith("_")
            ]
            lines += [f"    {name}.{member}{_member(each)}" for member, each in members if _is_own(each)]
        elif callable(value):
            lines.append(f"{name}{_signature(value)}")
        elif isinstance(value, ModuleType):
            lines.append(f"module {name}")
        else:
            lines.append(f"{name}: {type(value).__name__}")
    return lines


def _is_own(member: Any) -> bool:
    return isinstance(member, property) or inspect.isfunction(member)


def _member(member: Any) -> str:
    if isinstance(member, property):
        assert member.fget is not None
        return f": {inspect.signature(member.fget).return_annotation}"
    return _signature(member)


def _signature(value: Any) -> str:
    return str(inspect.signature(value)).replace("'", "")


def test_the_surface_changes_only_on_purpose() -> None:
    found = "\n".join(surface()) + "\n"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(found)
    assert found == GOLDEN.read_text(), "the public API changed: if that is meant, run this test with UPDATE_GOLDEN=1"


@pytest.mark.parametrize(
    "name", [name for name in maas_ray.__all__ if name not in ("__version__", "errors", "MaasError")]
)
def test_every_public_name_has_a_docstring(name: str) -> None:
    value = getattr(maas_ray, name)
    assert value.__doc__
    if inspect.isclass(value):
        undocumented = [
            member for member, each in inspect.getmembers_static(value)
            if not member.startswith("_") and _is_own(each) and not each.__doc__
        ]  # fmt: skip
        assert undocumented == []


def test_importing_the_package_imports_nothing_heavy() -> None:
    script = (
        "import sys, maas_ray; sys.exit(bool({'ray', 'torch', 'numpy', 'requests', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_a_package_is_still_a_package_and_names_the_function_it_calls() -> None:
    script = "import maas_ray.train.spec.train, maas_ray.serve.spec.pools, maas_ray; print(maas_ray.train, maas_ray.serve.spec.pools.PoolSpec)"  # fmt: skip
    assert subprocess.run([sys.executable, "-c", script], timeout=60, capture_output=True).returncode == 0
    assert "on_progress" in inspect.signature(maas_ray.train).parameters
    assert maas_ray.train.__name__ == "maas_ray.train"


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        maas_ray.tarin


def test_training_without_a_cluster_names_the_call_to_connect(tmp_path: Path) -> None:
    script = f"""
import maas_ray
try:
    maas_ray.train({{"run": "r", "model": {{"name": "mlp"}}, "data": {{"uri": "sklearn:iris", "task": "classification"}}}})
except maas_ray.MaasError as error:
    print(error)
try:
    maas_ray.Run("r", store={str(tmp_path)!r})
except maas_ray.errors.NotFound as error:
    print(error)
"""
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "call maas_ray.connect() first" in said.stdout, said.stderr
    assert "no run 'r'" in said.stdout
