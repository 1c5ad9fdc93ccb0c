"""The training benchmark's own arithmetic, from fixed figures."""

import subprocess
import sys

import pytest
from ray._common.utils import psutil

from benchmarks.training import table
from benchmarks.training.ours import Timed
from benchmarks.training.turns import cpu_s, step_times, used_since

RESULTS = {
    "date": "2030-01-01", "machine": {"cpus": 2, "cpu": "x"}, "versions": {"torch": "2.13.0"}, "settings": {"pairs": 3},
    "steps": [
        {"body": "mlp", "layout": "ddp", "pairs": [{"ours_s": ours, "plain_s": 0.1} for ours in (0.09, 0.101, 0.2)]},
        {"body": "mlp", "layout": "fsdp2", "pairs": [{"ours_s": 0.11, "plain_s": 0.1, "ours_cpu_s": 0.05, "plain_cpu_s": 0.04}]},
    ],
    "start": [
        {"ours_s": 30.0, "plain_s": 7.0, "bare_ray_s": 33.0, "is_first": True},
        {"ours_s": 9.0, "plain_s": 6.0, "bare_ray_s": 30.0, "is_first": False},
    ],
    "text": [{"ours_loss": 1.84, "plain_loss": 1.86, "pairs": [{"ours_s": 0.99, "plain_s": 1.0}]}],
    "images": [{"accuracy": 0.975}],
    "checkpoints": {
        "pairs": [{"with_s": 0.103, "without_s": 0.1, "with_cpu_s": 0.051, "without_cpu_s": 0.05}],
        "saving": {
            "rounds": [{"disk_s": {"one": 0.9, "parts": 0.95}, "waited_s": 1.0, "stall_s": 0.02, "slower_s": 0.1}],
            "read_per_needed": {"same cut": {"ratio": 1.0, "s": 1.0}, "other": {"ratio": 1.3, "s": 1.0}},
        },
    },
}  # fmt: skip
FIGURES = {figure.name: figure for figure in table.FIGURES}


@pytest.mark.parametrize(
    ("name", "median", "verdict"),
    [
        ("step time against a plain torchrun script, mlp, ddp, 2 ranks", 1.01, "reached"),
        ("step time against a plain torchrun script, mlp, fsdp2, 2 ranks", 1.1, "missed"),
        ("command to first step on a running cluster, 2 ranks", 9.0, "reached"),
        ("characters of a text, validation loss", 1.84, "aim"),
        ("the same, 2,000 steps against one file of PyTorch", 0.99, "aim"),
        ("resnet18 on images, 3 epochs, 2 ranks: test accuracy", 0.975, "reached"),
        ("overhead of a checkpoint every 50 steps", 3.0, "reached"),
        ("step stall of a save in the background against one that is waited for", 0.02, "aim"),
        ("save bandwidth against writing and fsyncing random bytes, whichever of two ways is faster", 0.9, "reached"),
        ("bytes read against bytes needed when resharding", 1.15, "missed"),
    ],
)
def test_a_figure_is_the_median_of_its_pairs_with_its_verdict(name: str, median: float, verdict: str) -> None:
    found = FIGURES[name].find(RESULTS)
    assert found is not None
    assert found.median == pytest.approx(median)
    assert FIGURES[name].verdict(found.median) == verdict
    assert name in table.markdown(RESULTS)


def test_the_table_has_the_measured_cpu_time_of_a_step_with_its_time() -> None:
    lines = table.markdown(RESULTS).splitlines()
    assert [line for line in lines if "of CPU" in line] == [
        "- mlp, fsdp2: ms of CPU a step and rank, ours / plain: 50.0 / 40.0, ratio 1.25 (1.25–1.25)",
    ]
    assert "- a checkpoint every 50 steps, CPU time of the ranks: 2.0 % (2.0 %–2.0 %) more" in lines


def test_a_lost_cpu_counter_is_left_out_and_reported() -> None:
    pairs = [{"ours_s": 0.1, "plain_s": 0.1, "ours_cpu_s": ours, "plain_cpu_s": 0.04} for ours in (0.05, -0.3, 0.05)]
    saves = [{"with_s": 0.1, "without_s": 0.1, "with_cpu_s": -0.2, "without_cpu_s": 0.05}]
    steps = [{"body": "mlp", "layout": "fsdp2", "pairs": pairs}]
    text = table.markdown({**RESULTS, "steps": steps, "checkpoints": {"pairs": saves}})
    assert "ours / plain: 50.0 / 40.0, ratio 1.25 (1.25–1.25)" in text
    assert "- mlp, fsdp2: 1 pairs without a CPU time are left out of it" in text
    assert "- a checkpoint every 50 steps: 1 pairs without a CPU time are left out of it" in text
    assert "(-" not in text
    assert " -" not in text.replace("\n- ", "\n").replace("| -", "|")


def test_the_counter_of_a_process_that_ended_is_lost() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        group = [psutil.Process(), psutil.Process(child.pid)]
        before = cpu_s(group)
        assert used_since(before, cpu_s(group)) is not None
        child.communicate(b"\n")
        assert cpu_s(group) is None
        assert used_since(before, cpu_s(group)) is None
    assert used_since(2.0, 1.5) is None, "a sum that lacks a process goes back"


def test_the_table_omits_missing_measurements_and_shows_foreign_load() -> None:
    assert "torchtitan" not in table.markdown(RESULTS)
    assert "NOT TO BE TRUSTED" not in table.markdown(RESULTS)
    assert "NOT TO BE TRUSTED: other programs used up to 1.5 CPUs" in table.markdown({**RESULTS, "foreign_cpus": 1.5})


def test_a_step_counts_in_the_turn_in_which_it_began_and_ended() -> None:
    done = {1: 10.0, 5: 11.0, 10: 12.0, 15: 13.5, 20: 15.0, 25: 16.0}
    assert step_times(done, 10.5, 14.0, log_every=5) == [pytest.approx(0.2), pytest.approx(0.3)]
    assert step_times(done, 13.6, 15.5, log_every=5) == []


def test_the_first_step_is_timed_from_the_command() -> None:
    timed = Timed(100.0, {1: 110.0, 10: 119.0}, 125.0, {})
    assert timed.first_step_s == 10.0
