"""The program of the tutorial of the Python API runs in an empty folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import RayCluster
from tests.support.pages import DOCS, blocks
from tests.support.root import ROOT

TIMEOUT_S = 800


@pytest.mark.fault
@pytest.mark.timeout(TIMEOUT_S + 200)
def test_the_blocks_of_the_tutorial_are_a_program(ray_cluster: RayCluster, tmp_path: Path) -> None:
    program = "".join(blocks((DOCS / "tutorial-python.md").read_text(), "python"))
    environment = os.environ | ray_cluster.env | {"MAAS_RAY_HOME": str(ray_cluster.state_dir), "PYTHONPATH": str(ROOT)}
    (tmp_path / "program.py").write_text(program)
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S
    )
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
