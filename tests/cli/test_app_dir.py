"""Models by import path are found where users of a console script expect: in the working directory, or in --app-dir."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from maas_ray.cli.options import APP_DIR_VARIABLE
from tests.conftest import RayCluster
from tests.support.root import ROOT

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, num_outputs):
        super().__init__(nn.Flatten(), nn.LazyLinear(num_outputs))
"""
SPEC = {
    "run": "r",
    "model": {"name": "my_nets:Net"},
    "data": {"uri": "sklearn:digits", "task": "classification"},
    "steps": 2,
    "storage": {"uri": "store"},
}
# What the console script does: `-c` would put the working directory on the path itself.
CONSOLE_SCRIPT = "from maas_ray.cli import main\nmain()\n"


def _maas_ray(directory: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    script = directory.parent / "bin" / "maas-ray"
    script.parent.mkdir(exist_ok=True)
    script.write_text(CONSOLE_SCRIPT)
    inherited = {name: value for name, value in os.environ.items() if name != APP_DIR_VARIABLE}
    env = {**inherited, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=240)


def _directories(tmp_path: Path) -> tuple[Path, Path]:
    """One with the spec and one with the module."""
    called, modules = tmp_path / "called", tmp_path / "modules"
    called.mkdir()
    modules.mkdir()
    (called / "train.yaml").write_text(yaml.safe_dump(SPEC))
    (modules / "my_nets.py").write_text(NET)
    return called, modules


@pytest.mark.fault
@pytest.mark.timeout(480)
def test_workers_import_a_model_from_the_working_directory_or_from_app_dir(
    tmp_path: Path, ray_cluster: RayCluster
) -> None:
    called, modules = _directories(tmp_path)
    missing = _maas_ray(called, "train", "train.yaml", **ray_cluster.env)
    assert missing.returncode == 1
    assert "No module named 'my_nets'" in missing.stderr
    assert "maas-ray --app-dir DIR" in missing.stderr
    given = _maas_ray(called, "--app-dir", str(modules), "train", "train.yaml", **ray_cluster.env)
    assert given.returncode == 0, given.stderr
    (modules / "train.yaml").write_text(yaml.safe_dump(SPEC))
    beside = _maas_ray(modules, "train", "train.yaml", **ray_cluster.env)
    assert beside.returncode == 0, beside.stderr


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused = _maas_ray(tmp_path, "--app-dir", "nowhere", "status")
    assert refused.returncode == 2
    assert "nowhere" in refused.stderr
