"""Who knows what: rules on imports that import-linter cannot express, since it sees only the root of other packages; and
rules on names, so that each has one meaning.
"""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.root import ROOT

FILES = sorted((ROOT / "maas_ray").rglob("*.py"))
INTERNALS = ROOT / "maas_ray" / "ray_internals"

_PRIVATE = re.compile(r"\bray(?:\.\w+)*\._\w+|\b_?internal_kv\w*|\b_get_global_client\b|\bHTTP_PROTOCOLS\b")
"""A private part of Ray, as imports and texts name it; and the table in which uvicorn, as Serve starts it, looks."""
_PRIVATE_OPTIONS = {"_internal", "_blocking", "_py_driver_sys_path"}
"""Parameters of public functions that are not for others."""
_PRIVATE_FIELDS = {
    "_asyncio_router",
    "_controller",
    "_fetch_replica_results_async",
    "_request_router",
    "_route_prefix",
    "_router",
    "_running_replicas",
}
"""Of Serve's objects; a class that derives from one of Serve's has its own."""

KNOWN_BY = {
    "ray.train": {
        "train/ranks/ray_train/failure_policy.py",
        "train/ranks/ray_train/launch.py",
        "train/ranks/ray_train/scaling_policy.py",
        "train/ranks/ray_train/worker_group.py",
        "ray_internals/train.py",
    },
    "ray.tune": {"train/search/tune.py"},
    # A replica and a pool, and what one asks its peers; code in Serve's controller and proxy uses its private parts.
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
    "argparse": {"console/job.py", "quickstart/pipeline.py"},  # what programs of jobs/ have in common
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


RUNS_CODE = {"torch.load", "yaml.load", "eval", "exec", "shell=True"}


def _calls(source: str) -> set[str]:
    """The names of called functions, and `shell=True` where a call has it."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            found.add(ast.unparse(node.func))
            found |= {"shell=True" for each in node.keywords if ast.unparse(each) == "shell=True"}
    return found


def test_no_load_path_runs_code() -> None:
    assert {str(path): bad for path in FILES if (bad := _calls(path.read_text()) & RUNS_CODE)} == {}


@pytest.mark.parametrize("source", ["x = eval(text)", "f(torch.load(path))", "subprocess.run(line, shell=True)"])
def test_a_call_that_runs_code_is_found(source: str) -> None:
    assert _calls(source) & RUNS_CODE


@pytest.mark.parametrize(
    "module", ["maas_ray.serve.replica.replica", "maas_ray.bundle.engine.engine", "maas_ray.registry.models"]
)
def test_serving_never_imports_torch(module: str) -> None:
    script = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def test_the_command_line_starts_without_torch_and_ray() -> None:
    script = "import sys, maas_ray.cli; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == 0


def private_names(source: str) -> set[str]:
    """The private parts of Ray that code names: in imports, in attributes, in options, and in texts that are not docstrings."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        texts: list[str] = []
        if isinstance(node, ast.Import):
            texts = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            texts = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            texts = [ast.unparse(node)]
            if node.attr in _PRIVATE_FIELDS and not (isinstance(node.value, ast.Name) and node.value.id == "self"):
                found.add(node.attr)
        elif isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.keyword):
            found |= _PRIVATE_OPTIONS & {node.arg}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts = [node.value] if "\n" not in node.value else []
            found |= (_PRIVATE_OPTIONS | _PRIVATE_FIELDS) & {node.value}
        found |= {text for each in texts for text in _PRIVATE.findall(each)}
    return found


def test_private_parts_of_ray_are_named_in_ray_internals_only() -> None:
    elsewhere = [path for path in FILES if INTERNALS not in path.parents]
    named = {str(path.relative_to(ROOT)): private_names(path.read_text()) for path in elsewhere}
    assert {path: names for path, names in named.items() if names} == {}
    here = {name for path in INTERNALS.glob("*.py") for name in private_names(path.read_text())}
    assert here >= _PRIVATE_OPTIONS | _PRIVATE_FIELDS, "the words that this test looks for are those that are used"


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("from ray._raylet import GcsClient", "ray._raylet"),
        ("import ray._private.worker", "ray._private"),
        ("from ray._common.utils import psutil", "ray._common"),
        ("from ray.train.v2._internal.execution.controller import TrainController", "ray.train.v2._internal"),
        ("def late():\n    from ray.serve._private import controller", "ray.serve._private"),
        ("from ray.serve.context import _get_global_client", "ray.serve.context._get_global_client"),
        ("from ray.experimental.internal_kv import _internal_kv_get", "ray.experimental.internal_kv._internal_kv_get"),
        ("from ray.experimental import internal_kv", "internal_kv"),
        ("client.internal_kv_get(b'a')", "internal_kv_get"),
        ("url = ray._private.worker.get_dashboard_url()", "ray._private"),
        ("serve = sys.modules.get('ray.serve._private.replica')", "ray.serve._private"),
        ("logging.getLogger('ray.data._internal.progress')", "ray.data._internal"),
        ("importlib.import_module(f'ray._private.{name}')", "ray._private"),
        ("uvicorn.config.HTTP_PROTOCOLS['auto'] = Ours", "HTTP_PROTOCOLS"),
        ("client._controller.get_grpc_config.remote()", "_controller"),
        ("getattr(handle, '_router', None)", "_router"),
        ("serve.delete(name, _blocking=False)", "_blocking"),
        ("options = {'_internal': True}", "_internal"),
    ],
)
def test_a_private_part_that_is_named_is_found(planted: str, name: str) -> None:
    assert name in private_names(planted)


@pytest.mark.parametrize(
    "fine", ["import ray", "from ray import serve", "ray.get(x)", "self._router.ask()", '"""Of ray._private.\n"""']
)
def test_what_is_public_or_ours_is_not(fine: str) -> None:
    assert private_names(fine) == set()


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
