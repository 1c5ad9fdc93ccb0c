"""The whole path by commands, for a table with gaps and strings: raw rows go over HTTP, and score as in torch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from maas_ray.checkpoint.catalog import list_checkpoints
from maas_ray.cli.app import app
from maas_ray.data.prepare import open_dataset
from maas_ray.registry.models import Registry
from maas_ray.train.records.runs import Runs
from maas_ray.train.validation.evaluate_run import evaluate_run
from tests.conftest import RayCluster
from tests.support.listening import listening_outside_loopback
from tests.support.paths import STEPS, FinishedRun, infer
from tests.support.root import ROOT


def _raw(text: str, datatype: str) -> Any:
    """A csv cell as a caller would send it: a gap is a null."""
    if text == "":
        return None
    return text if datatype == "BYTES" else int(text) if datatype == "INT64" else float(text)


JOBS = ROOT / "jobs"


def test_a_job_prints_the_steps_of_the_library_and_an_error_in_one_line(
    finished_run: FinishedRun, ray_cluster: RayCluster
) -> None:
    storage = finished_run.spec.storage

    def run(job: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [
            sys.executable,
            str(JOBS / job),
            "--store",
            storage.uri,
            "--endpoint",
            str(storage.endpoint),
            *arguments,
        ]
        environment = {**os.environ, **ray_cluster.env}
        return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=120, check=False)

    done = run("evaluate.py", "--run", "table")
    assert done.returncode == 0, done.stderr
    metrics = json.loads(done.stdout.splitlines()[-1])
    assert metrics["metrics"] == pytest.approx(evaluate_run(finished_run.store, "table").metrics)
    refused = run("publish.py", "--run", "nobody", "--name", "nobody")
    assert refused.returncode == 1
    said = [line for line in refused.stderr.splitlines() if "nobody" in line]
    assert said == [f"error[not_found]: no run 'nobody' in {storage.uri}; runs: table"]
    assert "Traceback" not in refused.stderr
    assert "File" not in refused.stderr


@pytest.mark.fault  # the tutorial's commands, with a table and S3: each part has short tests of its own
def test_a_table_goes_from_csv_through_an_s3_store_to_predictions_of_raw_rows(
    finished_run: FinishedRun, ray_cluster: RayCluster, tmp_path: Path
) -> None:
    table, spec, store = finished_run.table, finished_run.spec, finished_run.store
    held_out, target = table.held_out, spec.data.target
    serve = {"pools": [{"name": "cli", "models": [{"name": "table"}], "route_prefix": "/cli"}]}
    for name, document in (("train", spec.model_dump(mode="json")), ("serve", serve)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(document))
    assert spec.storage.endpoint is not None
    environment = {
        "MAAS_RAY_HOME": str(ray_cluster.state_dir),
        "MAAS_RAY_STORE": spec.storage.uri,
        "MAAS_RAY_ENDPOINT": spec.storage.endpoint,
    }
    in_store = [f"--set=storage.uri={spec.storage.uri}", f"--set=storage.endpoint={spec.storage.endpoint}"]

    def call(*arguments: str) -> Any:
        result: Result = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    def refused(*arguments: str) -> str:
        result: Result = CliRunner().invoke(app, [*arguments], env=environment)
        assert result.exit_code == 1
        return result.stderr

    reports = finished_run.reports
    assert reports[-1].step == reports[-1].total_steps == STEPS == list_checkpoints(store, "runs/table/checkpoints")[-1]
    assert "error[conflict]" in refused("train", str(tmp_path / "train.yaml"))
    trained = call("train", str(tmp_path / "train.yaml"), "--resume")  # which leaves a finished run as it is
    assert (trained["run"], trained["step"]) == ("table", STEPS)
    report = open_dataset(store, trained["data_digest"]).report
    assert sum(column["missing"] for column in report["columns"].values()) > 50
    assert [run["status"] for run in call("runs")] == ["finished"]
    in_torch = call("evaluate", "table")["metrics"]["accuracy"]
    assert in_torch > 0.7
    published = call("publish", "table", "--name", "table", "--promote", "production")
    assert published["version"] == 1

    registry = Registry(store)
    info = registry.info(registry.resolve("table"))
    lineage = info.lineage
    assert (lineage.run, lineage.step, lineage.data_digest) == ("table", STEPS, trained["data_digest"])
    assert lineage.spec_digest == Runs(store).get("table").spec.digest()

    pools = call("serve", str(tmp_path / "serve.yaml"), *in_store)
    try:
        assert pools["url"] == f"http://127.0.0.1:{ray_cluster.http_port}"
        assert call("status")["applications"] == {"cli": "RUNNING"}
        assert listening_outside_loopback(ray_cluster.state_dir) == set(), "replica, front and statistics included"
        inputs = [
            {
                "name": tensor.name,
                "datatype": tensor.datatype,
                "shape": [len(held_out), 1],
                "data": [_raw(row[tensor.name], tensor.datatype) for row in held_out],
            }
            for tensor in info.signature.inputs
        ]
        outputs, headers = infer(f"{pools['url']}/cli/v2/models/table/infer", inputs)
        assert (headers["x-maas-run"], headers["x-maas-version"]) == ("table", "1")
        predicted = [(info.labels or ())[code] for code in outputs["class"]]
        over_http = np.mean([label == row[target] for label, row in zip(predicted, held_out, strict=True)])
        assert over_http == pytest.approx(in_torch)

        answer = call("predict", "table", "--input", str(table.file), "--url", f"{pools['url']}/cli")
        assert [row["class"] for row in answer["predictions"]] == outputs["class"]
        unknown = refused("predict", "other", "--input", str(table.file), "--url", f"{pools['url']}/cli")
        assert "error[not_found]" in unknown
    finally:
        call("unserve", "cli")
    checked = call("fsck")
    assert (checked["problems"], checked["orphans"], checked["foreign"]) == ([], [], [])
