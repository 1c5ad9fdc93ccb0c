"""The commands of the README and of the tutorial run in order."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import CLUSTER_ENVIRONMENT
from tests.support.pages import DOCS, blocks
from tests.support.processes import processes_with_home
from tests.support.repository import files
from tests.support.root import ROOT

README = "".join(blocks((ROOT / "README.md").read_text(), "bash"))
TUTORIAL = "".join(blocks((DOCS / "tutorial.md").read_text(), "bash"))
OWN = [line for line in README.splitlines() if line not in TUTORIAL.splitlines()]
"""What the README has beyond the tutorial."""
TIMEOUT_S = 600


def test_the_readme_has_the_commands_of_the_tutorial_in_their_order() -> None:
    """So that one run of both tests each command of the README without running it twice."""
    assert OWN == ["make quickstart"]
    tutorial = iter(TUTORIAL.splitlines())
    shared = [line for line in README.splitlines() if line not in OWN]
    assert len(shared) > 5
    assert [line for line in shared if line not in tutorial] == [], "in another order than in the tutorial"


@pytest.mark.timeout(TIMEOUT_S)
def test_the_commands_run_in_order(tmp_path: Path) -> None:
    """As a user would: in a copy of the repository, in a home of its own, with an environment that is installed."""
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("the commands use .venv, which `make` installs")
    copy, home = tmp_path / "maas-ray", tmp_path / "home"
    home.mkdir()
    for name in files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    os.utime(copy / "pyproject.toml", (0, 0))  # older than the environment: make must not install the copy over it
    script = "\n".join(["set -euxo pipefail", *OWN, TUTORIAL])
    ours = (*CLUSTER_ENVIRONMENT, "RAY_", "MAAS_RAY_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"HOME": str(home)}
    try:
        done = subprocess.run(
            ["bash", "-c", script],
            cwd=copy,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
        )
        left = processes_with_home(home)
    finally:
        subprocess.run([ROOT / ".venv/bin/maas-ray", "down"], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "first 1 " in done.stdout, "the prediction names its run and version"
    assert left == [], "the commands ended their clusters themselves, with everything that those had started"
    assert {path.name for path in (home / ".maas-ray").iterdir()} <= {"lock"}
