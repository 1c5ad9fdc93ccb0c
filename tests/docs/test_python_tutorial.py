"""The program of the tutorial of the Python API runs in an empty folder, on a cluster of `maas-ray up`."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.support.pages import DOCS, blocks
from tests.support.root import ROOT

TIMEOUT_S = 800


@pytest.mark.fault
@pytest.mark.timeout(TIMEOUT_S + 400)
def test_the_blocks_of_the_tutorial_are_a_program(tmp_path: Path) -> None:
    program = "".join(blocks((DOCS / "tutorial-python.md").read_text(), "python"))
    (tmp_path / "program.py").write_text(program)
    state = Path(tempfile.mkdtemp(prefix="s"))
    ours = ("RAY_", "MAAS_RAY_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"MAAS_RAY_HOME": str(state), "PYTHONPATH": str(ROOT)}

    def run(*arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout_s)

    try:
        up = run("-m", "maas_ray.cli", "up", "--num-cpus", "4", "--port", "0", "--dashboard-port", "0", timeout_s=200)
        assert up.returncode == 0, up.stderr
        done = run("program.py", timeout_s=TIMEOUT_S)
    finally:
        run("-m", "maas_ray.cli", "down", "--drain-timeout-s", "0", timeout_s=200)
        shutil.rmtree(state, ignore_errors=True)
    assert done.returncode == 0, done.stderr[-4000:]
    trained, reopened, evaluated, published, served, predicted, one, many, goal, aliases, logits = (
        done.stdout.splitlines()
    )
    assert trained.startswith("finished ")
    assert "'step':" in reopened
    assert evaluated.startswith("36 ")
    assert float(evaluated.split()[1]) > 0.8
    assert published == "wine 1"
    assert served.endswith(" RUNNING")
    assert predicted.endswith(" wine-1 1")
    assert float(predicted.split()[0]) > 0.8
    assert (one, many) == ("0", "50")
    assert goal.startswith("accuracy 0.5 at step ")
    assert aliases == "{'wine': {'production': 2}}"
    assert logits.startswith("tensor([[")
