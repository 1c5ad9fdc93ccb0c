"""A node on which HAProxy may open too few files: `serve` prints the reason, and works once there are more."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import yaml

from maas_ray import cluster
from maas_ray.cluster.node.environment import BINARY_VARIABLE, find_launcher
from maas_ray.store.objects import open_store
from tests.serve.conftest import publish
from tests.support.interrupted import Command
from tests.support.onnx_models import commit_bundle

REFUSED, FEW = 200, 1024


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A cluster whose HAProxy has the hard limit in a file, as in a container."""
    launcher, limit = find_launcher(), tmp_path / "limit"
    limit.write_text(str(REFUSED))
    program = tmp_path / "maas-ray-haproxy"
    program.write_text(f'#!/bin/sh\nulimit -n "$(cat {limit})"\nexec {launcher} "$@"\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    state_dir = tmp_path / "state"
    try:
        cluster.up(
            num_cpus=3, profile="fast", state_dir=state_dir, ports=cluster.choose_ports(http=0, dashboard=0),
            env={BINARY_VARIABLE: str(program)},
        )  # fmt: skip
        yield tmp_path
    finally:
        cluster.down(state_dir=state_dir, drain_timeout_s=0)


@pytest.mark.fault
def test_the_reason_is_printed_within_the_time_of_a_start(home: Path) -> None:
    store = open_store(f"file://{home}/store")
    publish(store, "linear", commit_bundle(store))
    port = json.loads((home / "state" / "cluster.json").read_text())["http_port"]
    spec = {"storage": {"uri": store.uri}, "http": {"port": port}, "pools": [{"models": [{"name": "linear"}]}]}
    (home / "serve.yaml").write_text(yaml.safe_dump(spec))
    env = {"MAAS_RAY_HOME": str(home / "state"), "PATH": os.environ["PATH"]}

    refused = Command("serve", str(home / "serve.yaml"), env=env).end(170)
    assert refused.code == 1
    assert f"HAProxy may have {REFUSED} open files, which is too few for 100 connections" in refused.stderr
    assert "ulimit -Hn" in refused.stderr
    doctor = Command("doctor", "--json", env=env).end()
    failed = {check["name"]: check["detail"] for check in json.loads(doctor.stdout)["checks"] if not check["ok"]}
    assert f"HAProxy may have {REFUSED} open files" in failed["connections of node 127.0.0.1"]

    (home / "limit").write_text(str(FEW))
    served = Command("serve", str(home / "serve.yaml"), env=env).end(170)
    assert served.code == 0, served.stderr
    assert requests.get(f"http://127.0.0.1:{port}/v2/health/ready", timeout=20).status_code == 200
    shown = Command("status", "--json", env=env).end()
    (said,) = json.loads(shown.stdout)["few_connections"]
    assert f"because it may have {FEW} open files" in said
