"""The GPU benchmark in its CPU form: the same parts, tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.repository import ROOT

WITHOUT_RAY = "import sys, runpy; sys.modules['ray'] = None; sys.argv[0] = 'gpu'; runpy.run_module('benchmarks.gpu', run_name='__main__')"


def test_training_is_proved_on_a_machine_without_ray(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    sections = "resume,collectives,activations,save,optimizers,export"
    command = [sys.executable, "-c", WITHOUT_RAY, "--device", "cpu", "--sections", sections, "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    lines = {line["name"]: line for line in json.loads(output.read_text())["lines"]}
    assert len(lines) >= 10
    assert all(line["is_met"] is not False for line in lines.values())


def test_a_section_that_fails_is_a_line_of_the_table_and_of_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import __main__ as command

    def broken(setting: object) -> object:
        raise RuntimeError("no kernel image is available")

    monkeypatch.setitem(command.SECTIONS, "export", broken)
    output = str(tmp_path / "gpu.json")
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--sections", "export", "--output", output])
    assert command.main() == 1
    assert "| section export | RuntimeError: no kernel image is available | runs | NO |" in capsys.readouterr().out
