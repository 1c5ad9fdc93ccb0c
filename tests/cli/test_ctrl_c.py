"""Ctrl-C in a terminal, at commands that drive a run: it reaches the command and the processes that it has started."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from maas_ray.process.interrupts import exit_code
from maas_ray.store.objects import open_store
from maas_ray.train.records.runs import Runs
from tests.conftest import RayCluster
from tests.support.root import ROOT
from tests.support.terminal import CTRL_C, Terminal

DIGITS = str(ROOT / "jobs" / "specs" / "digits.yaml")


@pytest.fixture
def settings(tmp_path: Path) -> list[str]:
    fields = {"storage.uri": f"file://{tmp_path}/store", "run": "r", "epochs": 100_000, "workers.count": 1}
    return [word for name, value in fields.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def terminals() -> Iterator[list[Terminal]]:
    started: list[Terminal] = []
    yield started
    for terminal in started:
        terminal.process.kill()
        terminal.process.wait(60)
        terminal.close()


def _assert_one_line(terminal: Terminal) -> None:
    for trace in ("Traceback", "*** SIG", "Aborted", "Exception ignored"):
        assert trace not in terminal.output, terminal.output


@pytest.mark.fault
def test_the_first_ctrl_c_commits_and_says_how_to_continue(
    ray_cluster: RayCluster, tmp_path: Path, settings: list[str], terminals: list[Terminal]
) -> None:
    terminal = Terminal("train", DIGITS, *settings, env=ray_cluster.env)
    terminals.append(terminal)
    checkpoints = tmp_path / "store" / "runs" / "r" / "checkpoints"
    terminal.when(lambda: list(checkpoints.glob("*/manifest.json")))
    assert terminal.press(CTRL_C).end() == exit_code(2), terminal.output
    run = Runs(open_store(f"file://{tmp_path}/store")).get("r")
    assert run.status == "stopped"
    assert "a second signal ends it immediately" in terminal.output
    assert f"step {run.step} is committed" in terminal.output
    assert "--resume" in terminal.output
    _assert_one_line(terminal)


@pytest.mark.fault
def test_a_second_ctrl_c_ends_training_at_once(
    ray_cluster: RayCluster, tmp_path: Path, settings: list[str], terminals: list[Terminal]
) -> None:
    # One step takes longer than the test: the ranks cannot stop at its end.
    slow = ["--set", "model={name: 'tests.support.nets:SleepsInEachStep'}", "--set", "checkpoint.every_steps=1"]
    terminal = Terminal("--app-dir", str(ROOT), "train", DIGITS, *settings, *slow, env=ray_cluster.env)
    terminals.append(terminal)
    terminal.when(lambda: list((tmp_path / "store/runs/r/log").rglob("*.json")), 90)
    terminal.press(CTRL_C).when(lambda: "a second signal ends it" in terminal.output)
    assert terminal.press(CTRL_C).end(60) == exit_code(2), terminal.output
    assert "committed checkpoints of run r are kept: continue with --resume" in terminal.output
    _assert_one_line(terminal)


@pytest.mark.parametrize(
    ("command", "begun"),
    [
        (["verify-parallel", "DIGITS", "--steps", "2000"], "comparing"),
        (["lr-range", "DIGITS", "--steps", "1000000", "--high", "1e-4", "--low", "1e-6"], "of 1000000: rate"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_without_a_run_ends_with_one_line(
    ray_cluster: RayCluster, settings: list[str], terminals: list[Terminal], command: list[str], begun: str
) -> None:
    arguments = [DIGITS if word == "DIGITS" else word for word in command]
    terminal = Terminal(*arguments, *settings, env=ray_cluster.env)
    terminals.append(terminal)
    terminal.when(lambda: begun in terminal.output)
    assert terminal.press(CTRL_C).end(60) == exit_code(2), terminal.output
    assert "interrupted[SIGINT]: no run was created; run the command again" in terminal.output
    _assert_one_line(terminal)


@pytest.mark.fault
def test_ctrl_c_at_a_search_commits_its_trials_first(
    ray_cluster: RayCluster, tmp_path: Path, terminals: list[Terminal]
) -> None:
    base = yaml.safe_load(Path(DIGITS).read_text())
    base |= {"epochs": 100_000, "workers": {"count": 1}, "storage": {"uri": f"file://{tmp_path}/store"}}
    del base["run"]
    search = {"optimizer.lr": {"kind": "grid_search", "values": [0.01, 0.02]}}
    document = {"name": "s", "base": base, "search": search, "metric": "validation_accuracy", "max_concurrent": 1}
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(document))
    output = ["--output", str(tmp_path / "best.yaml")]
    terminal = Terminal("tune", str(tmp_path / "tune.yaml"), *output, env=ray_cluster.env)
    terminals.append(terminal)
    terminal.when(lambda: list((tmp_path / "store/runs").glob("s-*/checkpoints/*/manifest.json")))
    assert terminal.press(CTRL_C).end() == exit_code(2), terminal.output
    assert "continue with --resume" in terminal.output
    _assert_one_line(terminal)
