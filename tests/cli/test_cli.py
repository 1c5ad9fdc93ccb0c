"""The command line without a cluster: what it prints, where, and with which exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from maas_ray.bundle.format import BundleInfo, save_bundle
from maas_ray.cli.app import app
from maas_ray.cli.options import APP_DIR_VARIABLE
from maas_ray.cluster import connection
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.records.runs import Runs
from tests.support.root import ROOT
from tests.support.small_runs import make_run

COMMANDS = [
    "up",
    "down",
    "status",
    "doctor",
    "data",
    "train",
    "tune",
    "lr-range",
    "compare",
    "cv",
    "runs",
    "evaluate",
    "publish",
    "import",
    "promote",
    "models",
    "serve",
    "unserve",
    "predict",
    "verify-parallel",
    "fsck",
    "compact",
    "schema",
    "quickstart",
]
runner = CliRunner()


@pytest.fixture
def bundle(file_store: ObstoreStore) -> str:
    info = BundleInfo.model_validate(
        {
            "signature": {"inputs": [], "outputs": []},
            "task": "other",
            "parity": {},
            "metrics": {"accuracy": 0.5},
            "lineage": {"run": "r", "step": 1, "checkpoint_digest": "c", "data_digest": "d", "spec_digest": "s"},
        }
    )
    return save_bundle(file_store, info, b"graph")


def test_help_answers_without_torch_ray_or_the_store():
    script = (
        "import sys, maas_ray.cli.app; print([name for name in ('torch', 'ray', 'obstore') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
    assert connection.APP_DIR_VARIABLE == APP_DIR_VARIABLE  # repeated for that reason


def test_serve_logs_only_warnings_of_ray_serve():
    script = (
        "import logging\nfrom maas_ray.ray_internals.serve import log_only_warnings\nlog_only_warnings()\n"
        "logger = logging.getLogger('ray.serve')\nlogger.info('Started Serve')\nlogger.warning('slow')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert "Started Serve" not in done.stdout + done.stderr
    assert "slow" in done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_exists_and_has_json(command: str):
    result = runner.invoke(app, [command, "--help"], terminal_width=200)
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_there_is_no_other_command():
    assert sorted(command.name or command.callback.__name__ for command in app.registered_commands) == sorted(COMMANDS)


@pytest.mark.parametrize(("command", "spec"), [("tune", "digits-search"), ("lr-range", "digits")])
def test_a_missing_output_directory_is_refused_before_the_training(command: str, spec: str):
    path = ROOT / "jobs" / "specs" / f"{spec}.yaml"
    result = runner.invoke(app, [command, str(path), "--output", "/nowhere/best.yaml"])
    assert result.exit_code == 1
    assert "error[spec_invalid]: --output /nowhere/best.yaml: directory /nowhere does not exist" in result.stderr


def test_an_error_is_one_line_on_stderr_and_a_document_for_machines(file_store: ObstoreStore):
    arguments = ["models", "nothing", "--store", file_store.uri]
    result = runner.invoke(app, arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    error = f"error[not_found]: no model 'nothing' in {file_store.uri}; there are no models yet"
    assert result.stderr.splitlines() == [f"store {file_store.uri}", error]
    result = runner.invoke(app, [*arguments, "--json"])
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["code"] == "not_found"
    result = runner.invoke(app, [*arguments, "--debug"])
    assert "Traceback" in result.stderr


def test_a_table_in_a_pipe_has_one_line_for_each_row(file_store: ObstoreStore, tmp_path: Path):
    run = "b-" + "long-" * 17 + "name"
    spec, dataset = make_run(file_store, tmp_path, "mlp", run=run)
    Runs(file_store).create(spec, dataset.digest, None)
    listed = runner.invoke(app, ["runs", "--store", file_store.uri], env={"COLUMNS": None})
    assert listed.exit_code == 0
    assert sum(run in line for line in listed.stdout.splitlines()) == 1
    narrow = runner.invoke(app, ["runs", "--store", file_store.uri], env={"COLUMNS": "60"})
    assert max(map(len, narrow.stdout.splitlines())) <= 60


def test_models_are_promoted_and_listed(file_store: ObstoreStore, bundle: str):
    from maas_ray.registry.models import Registry

    Registry(file_store).publish("m", bundle)
    store = ["--store", file_store.uri, "--json"]
    assert json.loads(runner.invoke(app, ["promote", "m", "1", *store]).stdout)["version"] == 1
    listed = json.loads(runner.invoke(app, ["models", *store]).stdout)
    assert listed["m"]["aliases"] == {"production": 1}
    assert json.loads(runner.invoke(app, ["models", "m", *store]).stdout)["versions"][0]["bundle"] == bundle
    assert "production" in runner.invoke(app, ["models", "m", "--store", file_store.uri]).stdout
    result = runner.invoke(app, ["promote", "m", "2", "--store", file_store.uri])
    assert result.exit_code == 1
    assert "versions: 1" in result.stderr


def test_the_store_can_come_from_the_environment(file_store: ObstoreStore, bundle: str):
    result = runner.invoke(app, ["fsck", "--json"], env={"MAAS_RAY_STORE": file_store.uri})
    assert json.loads(result.stdout)["num_commits"] == 1


def test_fsck_finds_a_flipped_byte(file_store: ObstoreStore, bundle: str):
    assert runner.invoke(app, ["fsck", "--store", file_store.uri]).exit_code == 0
    (part,) = Path(file_store.uri.removeprefix("file://")).rglob("model.onnx")
    part.write_bytes(b"grapH")
    result = runner.invoke(app, ["fsck", "--store", file_store.uri, "--json"])
    assert result.exit_code == 1
    assert "model.onnx" in json.loads(result.stdout)["problems"][0]


def test_schemas_are_json_schema_with_a_description_of_each_field():
    both = json.loads(runner.invoke(app, ["schema"]).stdout)
    assert json.loads(runner.invoke(app, ["schema", "train", "--json"]).stdout) == both["train"]
    for schema in both.values():
        assert schema["additionalProperties"] is False
        fields = schema["properties"].values()
        assert all("description" in field or "$ref" in json.dumps(field) for field in fields)


def test_an_unknown_key_is_refused_with_the_nearest_valid_key(tmp_path: Path):
    spec = tmp_path / "train.yaml"
    spec.write_text("run: r\nmodell: {name: mlp}\n")
    result = runner.invoke(app, ["train", str(spec), "--state-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "unknown key 'modell'; did you mean 'model'?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["status"], "maas-ray up"),
        (["unserve"], "no cluster is recorded"),
        (["predict", "m", "--input", "x.csv"], "--url"),
        (["predict", "m", "--input", "x.csv", "--url", "http://127.0.0.1:9"], "nothing answers at http://127.0.0.1:9"),
        (["train", "missing.yaml"], "cannot read the spec missing.yaml"),
        (["runs", "--store", "ftp://x"], "unknown scheme 'ftp'"),
        (["publish", "r", "--name", "../x"], "not a valid name"),
    ],
)
def test_missing_files_and_clusters_are_reported(arguments: list[str], says: str, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    result = runner.invoke(app, arguments, env={"MAAS_RAY_HOME": str(tmp_path), "MAAS_RAY_STORE": str(tmp_path / "s")})
    assert result.exit_code != 0
    assert says in result.output


def test_down_without_a_cluster_does_nothing(tmp_path: Path):
    result = runner.invoke(app, ["down", "--json", "--state-dir", str(tmp_path)])
    assert (result.exit_code, json.loads(result.stdout)) == (0, {"stopped": False})


def test_an_onnx_file_is_imported_and_promoted(file_store: ObstoreStore, tmp_path: Path):
    from tests.support.onnx_models import linear

    (tmp_path / "m.onnx").write_bytes(linear())
    arguments = ["import", str(tmp_path / "m.onnx"), "--name", "m", "--store", file_store.uri]
    described = ["--alias", "production", "--task", "classification", "--labels", "a,b,c"]
    document = json.loads(runner.invoke(app, [*arguments, *described, "--json"]).stdout)
    assert (document["version"], document["promoted"], document["labels"]) == (1, "production", ["a", "b", "c"])
    assert document["run"] == f"import-{document['lineage']['imported']['sha256'][:16]}"
    proof = {"run": "passed", "rows": 3, "can_merge": True, "process": "the replica's", "warm_up": "zeros"}
    assert document["parity"] == {"status": "imported", **proof}
    shown = runner.invoke(app, arguments).stdout
    assert "imported m version 2" in shown
    assert "FP32 [-1, 3]" in shown
    assert "maas-ray promote m 2" in shown
    listed = json.loads(runner.invoke(app, ["models", "m", "--store", file_store.uri, "--json"]).stdout)
    assert listed["aliases"] == {"production": 1}
    (tmp_path / "m.onnx").write_bytes(b"something else")
    refused = runner.invoke(app, arguments)
    assert (refused.exit_code, refused.stdout) == (1, "")
    assert "is not an ONNX model" in refused.stderr
