"""Tests use the public parts of what they test: a private part can change without a change of behavior."""

import ast
from pathlib import Path

import pytest

from tests.support.root import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))

_SELF = {"self", "cls"}
_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}
"""Functions, and methods of pytest's monkeypatch, that take an attribute by its name."""

ALLOWED = {
    # Public despite their names.
    **dict.fromkeys(("_asdict", "_fields", "_make", "_replace"), "methods of every named tuple"),
    "_exit": "os._exit ends a process without any cleanup, as a kill does",
    # Of Ray, whose private parts the tests of our own use of them look at.
    "_bound_deployment": "the deployment in an application of Serve",
    "_replica_config": "the configuration of its replicas",
    "_cluster_node_info_cache": "Serve's scheduler",
    "_get_replicas_to_stop": "Serve's scheduler",
    "_head_node_id": "Serve's scheduler",
    "_launching_replicas": "Serve's scheduler",
    "_running_replicas": "Serve's scheduler",
    "_strategies": "our own placement in Serve's scheduler, in which it must keep its name",
    "_generate_config_file_internal": "the configuration that Serve's HAProxy writes",
    "_internal_kv_del": "the cluster's memory",
    "_raylet": "Ray's own client of a head node",
    # Of torch, which has no public names for them.
    "_dynamo": "resets the compiled code of this process",
    "_queued_calls": "calls that torch keeps for a device that is not initialized",
    "_world": "the process groups that exist",
}
"""Private attributes that tests use, each with its reason."""


def private_parts(source: str) -> set[str]:
    """Private attributes of other objects, also of those that are replaced, and private names imported from maas_ray."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not (isinstance(node.value, ast.Name) and node.value.id in _SELF):
            is_inherited = isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()"
            found |= {node.attr} if not is_inherited else set()
        elif isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in _BY_NAME:
            owner, *names = node.args
            is_own = isinstance(owner, ast.Name) and owner.id in _SELF
            found |= {text.value for text in names[:1] if isinstance(text, ast.Constant) and not is_own}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "maas_ray":
            found |= {alias.name for alias in node.names}
    return {name for name in found if str(name).startswith("_") and not str(name).startswith("__")}


def _used(files: list[Path]) -> dict[str, set[str]]:
    found = {str(path.relative_to(ROOT)): private_parts(path.read_text()) for path in files}
    return {path: names for path, names in found.items() if names}


def test_tests_use_no_private_parts() -> None:
    unexplained = {path: names - ALLOWED.keys() for path, names in _used(FILES).items()}
    assert {path: names for path, names in unexplained.items() if names} == {}


def test_each_exception_is_still_needed() -> None:
    assert ALLOWED.keys() - {"_asdict", "_fields", "_make", "_replace"} <= set().union(*_used(FILES).values())


@pytest.mark.parametrize(
    ("planted", "name"),
    [
        ("assert batcher._queue._max_items == 3", "_max_items"),
        ("batcher._loop.call_soon(work)", "_loop"),
        ("runner(engine)._rule.note(inputs)", "_rule"),
        ("engine._finished[-1] = end", "_finished"),
        ("monkeypatch.setattr(objects, '_RETRY', {})", "_RETRY"),
        ("getattr(batcher, '_queue', None)", "_queue"),
        ("from maas_ray.train.search.tune import _scheduler", "_scheduler"),
        ("def late():\n    from maas_ray.cluster.node.processes import _name", "_name"),
    ],
)
def test_a_private_part_is_found(planted: str, name: str) -> None:
    assert name in private_parts(planted) - ALLOWED.keys()


@pytest.mark.parametrize(
    "fine",
    [
        "self._rig.send(1)",
        "class Slow(Engine):\n    def _run(self):\n        return super()._run()",
        "queue.num_items",
        "getattr(self, '_held', [])",
        "type(x).__name__",
        "from tests.support.rig import _hidden",
        "OK._replace(status=503)",
    ],
)
def test_own_parts_and_public_ones_are_not(fine: str) -> None:
    assert private_parts(fine) - ALLOWED.keys() == set()
