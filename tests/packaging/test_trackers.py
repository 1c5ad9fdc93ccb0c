"""The callbacks of MLflow and Weights & Biases run with the packages that their extras install."""

import os
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import pytest

from tests.support.root import ROOT

TIMEOUT_S = 600
TESTS = "tests/train/callbacks/test_callbacks.py"


@pytest.mark.fault
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_the_extras_install_what_the_callbacks_need(tmp_path: Path) -> None:
    """They have 170 MB, so that the environment of the other tests does not contain them."""
    environment = tmp_path / "v"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=TIMEOUT_S)
    (packages,) = (environment / "lib").glob("python*/site-packages")
    (packages / "ours.pth").write_text(sysconfig.get_paths()["purelib"])  # pip installs only what is missing there
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        environment / "bin/python",
        "install",
        "-q",
        "--no-input",
        "--no-compile",
    ]
    subprocess.run([*pip, *extras["mlflow"], *extras["wandb"]], check=True, timeout=TIMEOUT_S)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", TESTS, "-k", "mlflow or wandb"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(packages)])},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert "2 passed" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
    assert "skipped" not in done.stdout
