"""The working directory was first on `sys.path` in every command: an `onnx.py` next to a downloaded model ran."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from maas_ray.cli.app import PANELS
from maas_ray.cli.options import APP_DIR_VARIABLE
from maas_ray.process import search_path
from tests.conftest import RayCluster
from tests.support.onnx_models import linear
from tests.support.root import ROOT

NAMES = (
    "onnx",
    "numpy",
    "json",
    "torch",
    "ray",
    "yaml",
    "pandas",
    "rich",
    "obstore",
    "typer",
    "onnxruntime",
    "_sitebuiltins",
)
"""Modules that a downloaded folder may hold: of the standard library, of ours, of those loaded late."""
CONSOLE = [sys.executable, str(Path(sys.executable).with_name("maas-ray"))]
MODULE = [sys.executable, "-m", "maas_ray.cli"]


def _trap(directory: Path, names: tuple[str, ...] = NAMES) -> Path:
    """A folder whose modules leave a trace if they run, and fail."""
    directory.mkdir(exist_ok=True)
    for name in names:
        text = f"open({str(directory / 'RAN')!r}, 'a').write({name + chr(10)!r})\nraise SystemExit('{name} ran')\n"
        (directory / f"{name}.py").write_text(text)
    return directory


def _run(
    command: list[str], directory: Path, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name not in (APP_DIR_VARIABLE, "PYTHONPATH")}
    return subprocess.run(
        [*command, *arguments],
        cwd=directory,
        env={**inherited, **(env or {})},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize(
    ("command", "env"),
    [
        (CONSOLE, {}),
        pytest.param(MODULE, {}, marks=pytest.mark.fault),
        pytest.param(CONSOLE, {"PYTHONPATH": ":/nowhere"}, marks=pytest.mark.fault),
    ],
    ids=["console script", "python -m", "an empty entry in PYTHONPATH"],
)
def test_a_folder_of_modules_next_to_a_model_does_not_run(
    tmp_path: Path, command: list[str], env: dict[str, str]
) -> None:
    directory = _trap(tmp_path / "downloaded")
    (directory / "model.onnx").write_bytes(linear(2.0))
    done = _run(command, directory, "import", "model.onnx", "--name", "m", "--store", "store", "--json", env=env)
    assert not (directory / "RAN").exists(), (directory / "RAN").read_text()
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == 1


@pytest.mark.fault
@pytest.mark.parametrize("command", [CONSOLE, MODULE], ids=["console script", "python -m"])
def test_a_command_that_builds_models_looks_there_last(tmp_path: Path, command: list[str]) -> None:
    directory = _trap(tmp_path / "downloaded")
    done = _run(command, directory, "evaluate", "r", "--store", "store")
    assert not (directory / "RAN").exists(), (directory / "RAN").read_text()
    assert "error[not_found]: no run 'r'" in done.stderr


PROBE = """
import json, os, sys
from maas_ray.cli import app as commands, reporting
def probe() -> reporting.CommandResult:
    '''Says where it looks.'''
    return reporting.CommandResult({"path": sys.path, "app_dir": os.environ.get("MAAS_RAY_APP_DIR")}, "")
def probe_models() -> reporting.CommandResult:
    '''The same.'''
    return probe()
commands.app.command("probe")(reporting.reported(probe))
commands.app.command("probe-models")(reporting.reported(reporting.uses_modules(probe_models)))
from maas_ray.cli import main
main()
"""


def _path(directory: Path, *arguments: str) -> list[str]:
    script = directory.parent / "bin" / "maas-ray"
    script.parent.mkdir(exist_ok=True)
    script.write_text(PROBE)
    done = _run(
        [sys.executable, str(script)], directory, *arguments, "--json", env={"PYTHONPATH": f"{directory}:{ROOT}"}
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout)["path"])


def test_only_commands_that_build_models_have_the_directory_and_it_is_the_last(tmp_path: Path) -> None:
    called, given = tmp_path / "called", tmp_path / "given"
    called.mkdir()
    given.mkdir()
    assert str(called) not in _path(called, "probe")
    assert str(given) not in _path(called, "--app-dir", str(given), "probe")
    assert _path(called, "probe-models")[-1] == str(called)
    assert _path(called, "--app-dir", str(given), "probe-models")[-1] == str(given)
    assert str(called) not in _path(called, "--app-dir", str(given), "probe-models")


def test_the_commands_that_build_models_are_these() -> None:
    found = {each.__name__ for commands in PANELS.values() for each in commands if getattr(each, "uses_modules", False)}
    assert found == {"train", "evaluate", "publish", "tune", "cv", "lr_range", "verify_parallel"}


def test_workers_look_where_their_driver_does_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    there = [entry for entry in sys.path if os.path.isdir(entry) and entry != str(tmp_path)]
    monkeypatch.setattr(sys, "path", there)
    workers: list[str] = ["/of/ray"]
    for entry in search_path.of_workers(str(tmp_path)):  # as Ray's workers do it
        workers.insert(0, entry)
    assert workers == [*dict.fromkeys(there), str(tmp_path), "/of/ray"]
    assert str(tmp_path) not in search_path.of_workers()


DRIVER = """
import sys, ray
from maas_ray.process.search_path import leave_out_working_directory
leave_out_working_directory()
from maas_ray.cluster import connect
connect()
def where():
    import numpy, sys
    return sys.path, numpy.__file__
path, file = ray.get(ray.remote(num_cpus=0)(where).remote(), timeout=120)
import json
print(json.dumps({"path": path, "numpy": file}))
"""


@pytest.mark.fault
def test_a_worker_of_a_driver_in_such_a_folder_does_not_run_it(tmp_path: Path, ray_cluster: RayCluster) -> None:
    directory = _trap(tmp_path / "downloaded")
    script = tmp_path / "bin" / "driver.py"
    script.parent.mkdir()
    script.write_text(DRIVER)
    done = _run([sys.executable, str(script)], directory, env={**ray_cluster.env, "PYTHONPATH": str(ROOT)})
    assert not (directory / "RAN").exists(), (directory / "RAN").read_text()
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert str(directory) not in found["path"]
    assert found["numpy"].startswith(sys.prefix)
    assert ray.is_initialized(), "this process has the cluster too"


def test_the_trap_is_one(tmp_path: Path) -> None:
    directory = _trap(tmp_path / "downloaded", ("onnx",))
    done = _run([sys.executable, "-c", "import onnx"], directory)
    assert (directory / "RAN").read_text() == "onnx\n"
    assert done.returncode == 1
