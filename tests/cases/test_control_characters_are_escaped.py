"""Terminal escapes in tensor names reached the terminal through tables; `runs --json` had `step: null` for a
committed step 50."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from rich.console import Group
from rich.progress import Progress
from typer.testing import CliRunner

from maas_ray.checkpoint.save import save
from maas_ray.cli.app import app
from maas_ray.console.output import SafeConsole, facts, table
from maas_ray.display import get_logger, shown
from maas_ray.errors import BadRequest, MaasError
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs
from maas_ray.train.spec.train import TrainSpec
from tests.checkpoint.states import snapshot

EVIL = {
    "escape": "\x1b]0;owned\x07\x1b[31mred\x1b[2J",
    "C1": "\x9b31m\x85\x90q\x9c",
    "bidi": "\u202egnp.exe\u2066\u2069\u200f\u061c",
    "separators": "a\u2028b\u2029c\r\x08\x0b",
    "tags": "\U000e0041\ufeff\u00ad",
    "markup": "[red]x[/] [/nothing] [link=http://x]y[/link]",
}
BAD = [*"\x1b\x07\x08\x0b\x0d\x9b\x85\x90\x9c\u202e\u2066\u2069\u200f\u061c\u2028\u2029\U000e0041\ufeff\u00ad"]


def _graph(path: Path, name: str) -> None:
    value = [helper.make_tensor_value_info(each, TensorProto.FLOAT, ["n", 2]) for each in (f"in{name}", f"out{name}")]
    node = helper.make_node("Relu", [f"in{name}"], [f"out{name}"])
    model = helper.make_model(
        helper.make_graph([node], "g", value[:1], value[1:]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
        producer_name=name,
    )
    path.write_bytes(model.SerializeToString())
    onnx.load(path)


@pytest.mark.parametrize("kind", ["escape", pytest.param("bidi", marks=pytest.mark.fault)])
def test_names_in_an_onnx_file_reach_the_terminal_escaped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    _graph(Path("model.onnx"), EVIL[kind])
    for arguments in (
        ["model.onnx"],
        ["model.onnx", "--json"],
        ["missing" + EVIL[kind]],
        ["model.onnx", "--labels", EVIL[kind]],
    ):
        done = CliRunner().invoke(app, ["import", "--name", "m", *arguments])
        text = done.stdout + done.stderr
        assert text
        assert [character for character in BAD if character in text] == []


@pytest.mark.parametrize("kind", EVIL)
def test_tables_lines_bars_errors_and_logs_are_escaped(
    kind: str, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    evil = EVIL[kind]
    console = SafeConsole(force_terminal=True, width=200, color_system="truecolor")
    for view in (
        table(evil, (evil, "b"), [(evil, None), (1, evil)]),
        facts(evil, {evil: evil}),
        Group(table("t", ("a",), [(evil,)]), *([] if kind == "markup" else [f"[red]problem[/] {evil}"])),
    ):
        console.print(view)
    with Progress(console=console) as bar:
        bar.add_task("x" if kind == "markup" else evil, total=1)
    log = get_logger("maas_ray.tests.of_escapes")
    log.warning("a name: %s", evil)
    try:
        raise MaasError(evil)
    except MaasError as error:
        log.error("failed", exc_info=error)
    out = capsys.readouterr().out + caplog.text + str(BadRequest(evil))
    # What rich itself sends are its own codes; nothing of the texts is among them.
    for found in ("owned\x07", "\x1b]0", "\x1b[2J", "\x1b[31mred"):
        assert found not in out
    assert [character for character in BAD if character not in "\x1b\x0d" and character in out] == []
    if kind == "markup":
        assert "[link=http://x]y[/link]" in out, "no markup is read in a text"


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=30))
def test_shown_text_is_printable_and_plain_text_is_unchanged(text: str) -> None:
    import unicodedata

    kept = {"\n", "\t", "\u200c", "\u200d"}
    found = shown(text)
    assert all(c in kept or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in found)
    assert shown(found) == found
    if text.isprintable():
        assert found == text
    logging.getLogger("maas_ray").isEnabledFor(10)


def _spec(store: ObstoreStore) -> TrainSpec:
    data: dict[str, Any] = {"uri": "sklearn:digits", "task": "classification"}
    return TrainSpec.model_validate({"run": "r", "model": {"name": "mlp"}, "data": data, "storage": {"uri": store.uri}})


@pytest.mark.parametrize("event", [None, {"type": "started"}, {"type": "stopped"}, {"type": "failed", "error": "e"}])
def test_runs_show_the_newest_committed_step(file_store: ObstoreStore, event: dict[str, Any] | None) -> None:
    runs = Runs(file_store)
    runs.create(_spec(file_store), "d" * 64, None)
    assert runs.get("r").step is None
    for step in (20, 50):
        save(file_store, "runs/r/checkpoints", snapshot(step))
    if event is not None:
        runs.record("r", event)
    done = CliRunner().invoke(app, ["runs", "--store", file_store.uri, "--json"])
    assert [(run["run"], run["step"]) for run in json.loads(done.stdout)] == [("r", 50)]
    runs.record("r", {"type": "finished", "step": 50, "reason": None})
    assert runs.get("r").step == 50


def test_a_damaged_run_is_listed_with_the_others(file_store: ObstoreStore) -> None:
    Runs(file_store).create(_spec(file_store), "d" * 64, None)
    file_store.put("runs/broken/manifest.json", b"{}")
    done = CliRunner().invoke(app, ["runs", "--store", file_store.uri, "--json"])
    listed = {run["run"]: run for run in json.loads(done.stdout)}
    assert listed["r"]["status"] == "started"
    assert listed["broken"]["status"] == "damaged"
    assert "runs/broken/manifest.json" in listed["broken"]["error"]
    assert np.isfinite(listed["r"]["created_s"])
