"""`maas-ray checkpoints`: output and exit codes."""

import json

import pytest
import safetensors.torch
from typer.testing import CliRunner

from maas_ray.checkpoint.catalog import HISTORY, open_checkpoint, pin, place
from maas_ray.checkpoint.save import save
from maas_ray.cli.app import app
from maas_ray.store.objects import ObstoreStore, open_store
from tests.checkpoint.states import PREFIX, is_equal, small_tensors, snapshot

runner = CliRunner()


@pytest.fixture
def saved(file_store: ObstoreStore) -> ObstoreStore:
    for step in (1, 2):
        save(file_store, PREFIX, snapshot(step, layout="dp 2", metrics={"loss": 0.5}))
    pin(file_store, PREFIX, 1, "published")
    return file_store


def _run(store: ObstoreStore, *arguments: str) -> tuple[int, dict]:
    result = runner.invoke(app, ["checkpoints", *arguments, "--store", store.uri, "--json"])
    return result.exit_code, json.loads(result.stdout)


@pytest.mark.parametrize("command", ["list", "verify", "reshard"])
def test_every_command_is_there_and_has_json(command: str) -> None:
    result = runner.invoke(app, ["checkpoints", command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_checkpoints_are_listed_with_their_descriptions(saved: ObstoreStore) -> None:
    code, found = _run(saved, "list", "r")
    assert code == 0
    assert [(each["step"], each["is_pinned"], each["error"]) for each in found] == [(1, True, None), (2, False, None)]
    num_bytes = sum(part.size for part in open_checkpoint(saved, PREFIX, 1).parts.values())
    expected = {"num_tensors": 8, "num_parts": 1, "num_ranks": 1, "layout": "dp 2", "num_bytes": num_bytes}
    assert found[0].items() >= expected.items()
    shown = runner.invoke(app, ["checkpoints", "list", "r", "--store", saved.uri]).stdout
    assert "dp 2" in shown


def test_a_damaged_checkpoint_is_listed_as_such_and_fails_verification(saved: ObstoreStore) -> None:
    assert _run(saved, "verify", "r") == (0, {"run": "r", "verified": [1, 2], "problems": {}})
    part = open_checkpoint(saved, PREFIX, 2).parts["00000-00000.safetensors"]
    data = bytearray(saved.get(part.key))
    data[-1] ^= 1
    saved.put(part.key, bytes(data))
    saved.put(f"{place(PREFIX, 1)}/manifest.json", b"{}")
    code, found = _run(saved, "verify", "r")
    assert (code, sorted(found["problems"])) == (1, ["1", "2"])
    assert part.key in found["problems"]["2"][0]
    assert _run(saved, "verify", "r", "--step", "2")[0] == 1
    assert [bool(each["error"]) for each in _run(saved, "list", "r")[1]] == [True, False]


def test_a_missing_checkpoint_is_reported(saved: ObstoreStore) -> None:
    code, found = _run(saved, "verify", "other")
    assert (code, found["error"]["code"]) == (1, "not_found")
    code, found = _run(saved, "verify", "r", "--step", "9")
    assert (code, "steps: 1, 2" in found["error"]["message"]) == (1, True)


def test_a_checkpoint_is_resharded_into_another_store(saved: ObstoreStore, tmp_path) -> None:
    code, found = _run(saved, "reshard", "r", "--to", str(tmp_path / "copy"), "--parts", "2")
    assert (code, found["step"], len(found["files"])) == (0, 2, 2)
    copy = open_store(str(tmp_path / "copy"))
    tensors = {name: value for key in found["files"] for name, value in safetensors.torch.load(copy.get(key)).items()}
    assert is_equal(tensors, small_tensors(2))
    assert HISTORY in open_checkpoint(copy, PREFIX).parts
    code, found = _run(saved, "reshard", "r", "--to", saved.uri)
    assert (code, found["error"]["code"]) == (1, "conflict")
