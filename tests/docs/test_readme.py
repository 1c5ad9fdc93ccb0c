"""The README is true: its commands run in order, its links lead somewhere, its tables match the code."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray._common.utils import psutil

from maas_ray import errors
from maas_ray.errors import MaasError
from tests.conftest import CLUSTER_ENVIRONMENT
from tests.support.root import ROOT

README = (ROOT / "README.md").read_text()
TIMEOUT_S = 600


def _files() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def _processes_at_home(home: Path) -> list[str]:
    """The commands of all processes that were started with this home, whoever started them."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or belongs to another user
    return found


def _classes(root: type[MaasError] = MaasError) -> Iterator[type[MaasError]]:
    yield root
    for child in root.__subclasses__():
        yield from _classes(child)


def test_links_lead_to_files_of_the_repository() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert len(targets) > 5
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_layout_names_every_part_and_nothing_else() -> None:
    block = README.split("## Layout")[1].split("```")[1].strip("\n")
    top, package = set(), set()
    for line in block.splitlines():
        name = line.split()[0].rstrip("/")
        (package if line.startswith("  ") else top).add(name)
    files = _files()
    assert package == {name.split("/")[1] for name in files if name.startswith("maas_ray/")} - {
        "__init__.py",
        "py.typed",
    }
    assert top == {name.split("/")[0] for name in files if not name.startswith(".")} - {
        "README.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "LICENSE",
        "CHANGELOG.md",
        "pyproject.toml",
    }


def test_the_error_table_is_that_of_the_code() -> None:
    section = README.split("<!-- errors -->")[1].split("<!-- /errors -->")[0]
    expected = ["| code | HTTP | retry | when |", "|---|---|---|---|"]
    for kind in _classes():
        if kind.__module__ == errors.__name__:
            when = (kind.__doc__ or "").splitlines()[0]
            expected.append(f"| `{kind.code}` | {kind.http_status} | {'yes' if kind.retryable else 'no'} | {when} |")
    assert section.strip().splitlines() == expected


@pytest.mark.timeout(TIMEOUT_S)
def test_the_commands_run_in_order_as_they_stand(tmp_path: Path) -> None:
    """As a user would: in a copy of the repository, in a home of its own, with an environment that is installed."""
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("the commands use .venv, which `make` installs")
    copy, home = tmp_path / "maas-ray", tmp_path / "home"
    home.mkdir()
    for name in _files():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    (copy / ".venv").symlink_to(ROOT / ".venv")
    os.utime(copy / "pyproject.toml", (0, 0))  # older than the environment: make must not install the copy over it
    script = "\n".join(["set -euxo pipefail", *re.findall(r"```bash\n(.*?)```", README, re.DOTALL)])
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
        left = _processes_at_home(home)
    finally:
        subprocess.run([ROOT / ".venv/bin/maas-ray", "down"], env=environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "first 1 " in done.stdout, "the prediction names its run and version"
    assert left == [], "the commands ended their clusters themselves, with everything that those had started"
    assert {path.name for path in (home / ".maas-ray").iterdir()} <= {"lock"}
