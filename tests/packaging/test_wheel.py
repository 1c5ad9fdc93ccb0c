"""The wheel, installed into an empty environment, runs the quickstart without the checkout."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.processes import processes_with_home
from tests.support.repository import files
from tests.support.root import ROOT

INSTALL_TIMEOUT_S, QUICKSTART_TIMEOUT_S = 1500, 600
pytestmark = [pytest.mark.fault, pytest.mark.timeout(INSTALL_TIMEOUT_S + QUICKSTART_TIMEOUT_S)]

WATCH = """
import os, sys
def watch(event, args):
    if event == "open" and isinstance(args[0], str) and args[0].startswith({root!r}):
        with os.fdopen(os.open({report!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a") as report:
            report.write(args[0] + "\\n")
sys.addaudithook(watch)
"""
"""Reports each file of the checkout that a process opens; Python opens the file of each module that it imports."""


@dataclass(frozen=True)
class Installed:
    """An environment that contains the wheel and its dependencies only."""

    wheel: Path
    programs: Path
    """Directory of the environment's programs."""
    home: Path
    environment: dict[str, str]
    opened: Path
    """Lists the files of the checkout that processes of the environment have opened."""


@pytest.fixture(scope="module")
def installed() -> Iterator[Installed]:
    # Not pytest's directory, which outlives the test: the environment has 2 GB, and Ray's sockets need a short path.
    base = Path(tempfile.mkdtemp(prefix="w"))
    try:
        source, home = base / "source", base / "home"
        home.mkdir()
        for name in filter(lambda name: (ROOT / name).is_file(), files()):  # setuptools writes into the source
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name)
        (base / "t").mkdir()
        ours = ("RAY_", "MAAS_RAY_", "PYTHON", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        environment |= {"HOME": str(home), "TMPDIR": str(base / "t")}

        def run(*command: str | Path) -> None:
            done = subprocess.run(
                command, cwd=base, env=environment, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
            )
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]

        run(sys.executable, "-m", "venv", base / "v")
        python = base / "v/bin/python"
        run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", base / "dist", source)
        shutil.rmtree(source)
        (wheel,) = (base / "dist").glob("*.whl")
        run(python, "-m", "pip", "install", "-q", "--no-input", "--no-compile", wheel)
        (packages,) = (base / "v/lib").glob("python*/site-packages")
        opened = base / "opened"
        (packages / "watch_checkout.py").write_text(WATCH.format(root=f"{ROOT}/", report=str(opened)))
        (packages / "watch_checkout.pth").write_text("import watch_checkout\n")  # runs at the start of each process
        yield Installed(wheel, base / "v/bin", home, environment, opened)
    finally:
        shutil.rmtree(base, ignore_errors=True)


def test_the_wheel_contains_each_file_of_the_package_and_no_other(installed: Installed) -> None:
    names = zipfile.ZipFile(installed.wheel).namelist()
    expected = {name for name in files() if name.startswith("maas_ray/")}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert {"maas_ray/py.typed", "maas_ray/serve/grpc/inference.proto"} <= expected
    assert {Path(name).name for name in names if ".dist-info/" in name} >= {"entry_points.txt", "LICENSE"}


def test_an_import_from_the_checkout_is_noticed(installed: Installed) -> None:
    """The negative control of the next test."""
    command = [installed.programs / "python", "-c", "import maas_ray"]
    environment = {**installed.environment, "PYTHONPATH": str(ROOT)}
    try:
        subprocess.run(command, cwd=installed.home, env=environment, check=True, timeout=60)
        assert any("maas_ray" in line for line in installed.opened.read_text().splitlines())
    finally:
        installed.opened.unlink(missing_ok=True)


def test_the_quickstart_runs_from_the_wheel_alone(installed: Installed) -> None:
    empty = installed.home / "empty"
    empty.mkdir()
    try:
        done = subprocess.run(
            [installed.programs / "maas-ray", "quickstart"],
            cwd=empty,
            env={**installed.environment, "COLUMNS": "200"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=QUICKSTART_TIMEOUT_S,
        )
        left = processes_with_home(installed.home)
    finally:
        for record in empty.rglob("cluster.json"):
            down = [installed.programs / "maas-ray", "down", "--drain-timeout-s", "0", "--state-dir", record.parent]
            subprocess.run(down, env=installed.environment, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "digits version 1" in done.stdout
    accuracies = re.findall(r"accuracy (in PyTorch|in ONNX|over HTTP)\W+(\d\.\d{4})", done.stdout)
    assert [where for where, _ in accuracies] == ["in PyTorch", "in ONNX", "over HTTP"], done.stdout
    assert len({value for _, value in accuracies}) == 1
    assert float(accuracies[0][1]) > 0.9
    assert not installed.opened.exists(), installed.opened.read_text()
    assert left == [], "the quickstart stopped its cluster with everything that it started"
