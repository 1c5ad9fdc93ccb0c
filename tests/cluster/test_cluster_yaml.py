"""cluster.yaml: accepted by Ray's validation, as written and for the other providers in its comments."""

import copy
import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import ValidationError
from ray.autoscaler._private.util import prepare_config, validate_config

from maas_ray.cluster.node.environment import profile_flags
from tests.support.root import ROOT

TEXT = (ROOT / "cluster.yaml").read_text()
STUBS = {
    "sudo": 'if [[ $1 == tee ]]; then exec cat > "$HOME/unit"; fi; exec "$@"',
    # What systemd would run, with an environment that is empty except for what the unit says.
    "systemctl": 'if [[ $1 == restart ]]; then start=$(sed -n "s/^ExecStart=//p" "$HOME/unit"); '
    'exec env -i PATH="$PATH" $(sed -n "s/^Environment=//p" "$HOME/unit") bash -c "$start"; fi',
    "maas-ray-haproxy": "exit 0",
    "ray": 'printf "%q " "$@" > "$HOME/ray.args"; env -0 > "$HOME/ray.env"',
}


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(yaml.safe_load(TEXT))


def check(config: dict[str, Any]) -> dict[str, Any]:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


def test_ray_accepts_it_as_written(config: dict[str, Any]):
    prepared = check(config)
    assert prepared["available_node_types"]["head"]["resources"] == {"CPU": 0}
    assert prepared["available_node_types"]["gpu_worker"]["max_workers"] == 4


def test_rays_validation_refuses_an_unknown_key(config: dict[str, Any]):
    config["available_node_typos"] = {}
    with pytest.raises(ValidationError):
        check(config)


@pytest.mark.parametrize(
    "provider",
    [
        {"type": "gcp", "region": "us-west1", "availability_zone": "us-west1-a", "project_id": "p"},
        {
            "type": "external",
            "module": "ray.autoscaler._private.aliyun.node_provider.AliyunNodeProvider",
            "region": "cn-hangzhou",
            "access_key": "a",
            "access_key_secret": "b",
        },
    ],
    ids=["gcp", "aliyun"],
)
def test_ray_accepts_it_for_other_clouds(config: dict[str, Any], provider: dict[str, str]):
    check({**config, "provider": provider})


def test_the_short_name_of_aliyun_fails_as_documented(config: dict[str, Any]):
    with pytest.raises(FileNotFoundError):
        check({**config, "provider": {"type": "aliyun", "region": "cn-hangzhou"}})


def test_ray_accepts_it_for_a_list_of_hosts(config: dict[str, Any]):
    for key in ("available_node_types", "head_node_type", "max_workers"):
        del config[key]
    config["provider"] = {"type": "local", "head_ip": "10.0.0.1", "worker_ips": ["10.0.0.2", "10.0.0.3"]}
    config["auth"] = {"ssh_user": "ubuntu", "ssh_private_key": "~/.ssh/id_ed25519"}
    assert check(config)["max_workers"] == 2


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("head", ["start", "--head", "--block", "--num-cpus=0", "--dashboard-host=127.0.0.1"]),
        ("worker", ["start", "--block", "--address=10.0.0.1:6379"]),
    ],
)
def test_ray_is_started_on_each_node_with_the_fast_profile(config, kind: str, expected: list[str], tmp_path: Path):
    """Runs the shell lines of the file, with programs that record their arguments."""
    stubs = tmp_path / "venv" / "bin"
    stubs.mkdir(parents=True)
    for name, body in STUBS.items():
        (stubs / name).write_text(f"#!/bin/bash\n{body}\n")
        (stubs / name).chmod(0o755)
    writes_env = next(line for line in config["setup_commands"] if "maas-ray.env <<" in line)
    unit = next(line for line in config["setup_commands"] if "maas-ray.service" in line)
    start = [line for line in config[f"{kind}_start_ray_commands"] if "maas-ray.start" in line or "systemctl" in line]
    environment = {"HOME": str(tmp_path), "PATH": f"{stubs}:{os.environ['PATH']}", "RAY_HEAD_IP": "10.0.0.1"}
    for line in (writes_env, unit, *start):
        subprocess.run(["/bin/bash", "-c", line], env=environment, check=True, timeout=30)

    arguments = shlex.split((tmp_path / "ray.args").read_text())
    assert [argument for argument in expected if argument not in arguments] == []
    seen = dict(item.split("=", 1) for item in (tmp_path / "ray.env").read_text().split("\0") if item)
    assert {name: seen.get(name) for name in profile_flags("fast")} == profile_flags("fast")
    assert seen["RAY_SERVE_HAPROXY_BINARY_PATH"] == str(stubs / "maas-ray-haproxy")
    assert seen["RAY_AUTH_TOKEN_PATH"] == f"{tmp_path}/.maas-ray-token.private"


def test_every_shell_line_is_valid(config: dict[str, Any]):
    for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands"):
        for line in config[key]:
            subprocess.run(["/bin/bash", "-n"], input=line, text=True, check=True, timeout=30)
