"""Who knows what: rules on imports that import-linter cannot express, since it sees only the root of other packages; and
rules on names, so that each has one meaning.
"""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.root import ROOT

FILES = sorted((ROOT / "maas_ray").rglob("*.py"))

KNOWN_BY = {
    "ray.train": {"train/ranks/launch.py"},
    "ray.tune": {"train/search/tune.py"},
    # A replica and a pool; what one asks its peers; and what stands in Serve's own proxy, which is no replica.
    "ray.serve": {
        "serve/replica/replica.py",
        "serve/deploy/pool.py",
        "serve/controller/install.py",
        "serve/controller/moves.py",
        "serve/controller/scheduler.py",
        "serve/deploy/binding.py",
        "serve/deploy/front.py",
        "serve/deploy/patience.py",
        "serve/deploy/pools.py",
        "serve/deploy/ready.py",
        "serve/deploy/rollout.py",
        "serve/deploy/standing.py",
        "serve/deploy/state.py",
        "serve/replica/broadcast.py",
        "serve/front/proxy_middleware.py",
        "serve/replica/other_pools.py",
    },
    "pickle": set(),
    "cloudpickle": set(),
    "argparse": {"cli/job.py"},  # what programs of jobs/ have in common
}

NAMED_AS_THE_STANDARD_LIBRARY = {
    "serve/http": "the protocol's own name, as `serve/grpc` beside it; every import is absolute, so it hides nothing",
}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("package", KNOWN_BY)
def test_a_package_is_known_only_where_it_belongs(package: str) -> None:
    users = {
        str(path.relative_to(ROOT / "maas_ray"))
        for path in FILES
        if any(name == package or name.startswith(f"{package}.") for name in _imports(path))
    }
    assert users == KNOWN_BY[package]


@pytest.mark.parametrize("call", ["torch.load(", "yaml.load(", "eval(", "exec(", "shell=True"])
def test_no_load_path_runs_code(call: str) -> None:
    assert [str(path) for path in FILES if f" {call}" in path.read_text() or f"({call}" in path.read_text()] == []


@pytest.mark.parametrize(
    "module", ["maas_ray.serve.replica.replica", "maas_ray.bundle.engine.engine", "maas_ray.registry.models"]
)
def test_serving_never_imports_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_command_line_starts_without_torch_and_ray() -> None:
    script = "import sys, maas_ray.cli; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def _defined_twice(files: Iterable[Path]) -> dict[str, list[str]]:
    """Public classes that more than one of the modules defines, each with these."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in files:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found[node.name].append(str(path))
    return {name: paths for name, paths in found.items() if len(paths) > 1}


def test_a_public_class_name_has_one_meaning() -> None:
    assert _defined_twice(FILES) == {}


def test_a_class_name_that_is_taken_is_noticed(tmp_path: Path) -> None:
    planted = tmp_path / "planted.py"
    planted.write_text("class ModelManager:\n    pass\n\n\nclass _Record:\n    pass\n\n\nclass NoOther:\n    pass\n")
    taken = str(ROOT / "maas_ray" / "serve" / "models" / "manager.py")
    assert _defined_twice([*FILES, planted]) == {"ModelManager": [taken, str(planted)]}


def test_no_module_is_named_as_one_of_the_standard_library() -> None:
    modules = (path.parent if path.stem == "__init__" else path.with_suffix("") for path in FILES)
    found = {str(module.relative_to(ROOT / "maas_ray")) for module in modules if module.name in sys.stdlib_module_names}
    assert found == set(NAMED_AS_THE_STANDARD_LIBRARY)
