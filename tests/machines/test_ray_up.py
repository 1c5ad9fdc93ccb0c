"""`ray up cluster.yaml` with the local provider, over ssh, as its comments describe: the whole file is run unchanged."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.hosts import Network, ray_cluster, ssh
from tests.support.hosts.ray_cluster import CLUSTER_YAML, TOKEN
from tests.support.hosts.served import publish, serve, statuses, write_spec

pytestmark = pytest.mark.skipif(bool(ssh.why_not()), reason=ssh.why_not())
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as found:
        yield found


@pytest.fixture(scope="module")
def config(network: Network) -> Path:
    """The file, changed as its part about a list of hosts says; the machines' user is root."""
    document: dict[str, Any] = yaml.safe_load(CLUSTER_YAML.read_text())
    for key in ("available_node_types", "head_node_type", "max_workers"):
        del document[key]
    key = network.directory / "key"
    ssh.make_key(key)
    for host in network.hosts:
        ssh.start(host, key.with_suffix(".pub").read_text())
    head, worker = network.hosts
    document["provider"] = {"type": "local", "head_ip": head.address, "worker_ips": [worker.address]}
    document["auth"] = {"ssh_user": "root", "ssh_private_key": str(key)}
    token = network.directory / "token"
    token.write_text(TOKEN)
    project = network.directory / "project"
    project.mkdir()
    shutil.copy(CLUSTER_YAML.with_name("pyproject.toml"), project)
    document["file_mounts"] = {"/home/maas/maas-ray": str(project), "/home/maas/.maas-ray-token": str(token)}
    document["head_start_ray_commands"] = [
        line
        for line in document["head_start_ray_commands"]
        if "maas_ray.cluster.capacity.autoscaler_limits" not in line
    ]
    path = network.directory / "cluster.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_ray_up_makes_a_cluster_that_serves_and_ray_down_ends_it(network: Network, config: Path):
    publish(network)
    home = network.directory / "driver"
    home.mkdir()
    env = {**os.environ, "HOME": str(home), "RAY_AUTH_MODE": "disabled", "PYTHONPATH": ""}
    up = [RAY, "up", "-y", "--no-config-cache", str(config)]
    done = subprocess.run(up, env=env, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    ray_cluster.wait_for_nodes(network, 2, 240)  # the head itself sets the worker up, over ssh
    document = serve(network, write_spec(network))
    assert document["pools"][0]["status"] == "RUNNING"
    assert statuses(network.hosts) == [200, 200]
    doctor = ray_cluster.on_head(network, "maas-ray doctor --json", check=False)
    checks = {check["name"]: check for check in json.loads(doctor.strip().splitlines()[-1])["checks"]}
    for host in network.hosts:
        assert checks[f"environment of node {host.address}"]["ok"], checks[f"environment of node {host.address}"]
    down = subprocess.run([RAY, "down", "-y", str(config)], env=env, capture_output=True, text=True, timeout=300)
    assert down.returncode == 0, down.stdout[-3000:] + down.stderr[-3000:]
