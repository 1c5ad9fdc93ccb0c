"""Who knows what: rules on imports that import-linter cannot express, since it sees only the root of other packages."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.root import ROOT

FILES = sorted((ROOT / "maas_ray").rglob("*.py"))

KNOWN_BY = {
    "ray.train": {"train/ranks/launch.py", "ray_internals/train.py"},
    "ray.tune": {"train/search/tune.py"},
    # A replica and a pool, and what one asks its peers; what stands in Serve's controller and proxy knows its private parts.
    "ray.serve": {
        "serve/replica/replica.py",
        "serve/deploy/pool.py",
        "serve/deploy/binding.py",
        "serve/deploy/front.py",
        "serve/deploy/patience.py",
        "serve/deploy/ready.py",
        "serve/deploy/rollout.py",
        "serve/deploy/state.py",
        "serve/replica/broadcast.py",
        "serve/replica/other_pools.py",
        "ray_internals/serve.py",
        "ray_internals/serve_controller.py",
    },
    "pickle": set(),
    "cloudpickle": set(),
    "argparse": {"cli/job.py"},  # what programs of jobs/ have in common
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
