"""A Ray cluster on a network of hosts, started by cluster.yaml's own commands: the first host is the head."""

import time
from collections.abc import Mapping

import yaml

from tests.support.hosts.host import Host
from tests.support.hosts.network import Network
from tests.support.root import ROOT

CLUSTER_YAML = ROOT / "cluster.yaml"
TOKEN = "0123456789abcdef" * 4
AUTOSCALING = ' --autoscaling-config="$HOME/ray_bootstrap_config.yaml"'
LIMITS = "maas_ray.cluster.capacity.autoscaler_limits"


def prepare(host: Host, env: Mapping[str, str] | None = None) -> None:
    """Runs the setup commands, but for packages, which the image of a host has.

    Args:
        host: the host.
        env: further variables of the cluster, as a user adds them.
    """
    (host.home / ".maas-ray-token").write_text(TOKEN)
    for line in _commands("setup_commands"):
        host.run(line)
    with (host.home / "maas-ray.env").open("a") as file:
        file.writelines(f"export {name}={value}\n" for name, value in (env or {}).items())


def start(
    network: Network,
    *,
    num_cpus: int = 2,
    head_cpus: int = 0,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 180.0,
) -> None:
    """Starts a head and a worker on each further host, as for a list of hosts, and waits until all have joined."""
    for number, host in enumerate(network.hosts):
        prepare(host, env)
        start_node(network, host, head_cpus if number == 0 else num_cpus)
    wait_for_nodes(network, len(network.hosts), timeout_s)


def start_node(network: Network, host: Host, num_cpus: int) -> None:
    """Runs the start commands of one node."""
    is_head = host is network.hosts[0]
    for line in _commands("head_start_ray_commands" if is_head else "worker_start_ray_commands"):
        if LIMITS in line:
            continue  # a list of hosts has no limits beyond itself
        line = line.replace(AUTOSCALING, "").replace("--num-cpus=0", f"--num-cpus={num_cpus}")
        if not is_head:
            line = line.replace("ray start --block", f"ray start --block --num-cpus={num_cpus}")
        host.run(line, env={"RAY_HEAD_IP": network.hosts[0].address}, timeout_s=180)


def wait_for_nodes(network: Network, num_nodes: int, timeout_s: float) -> None:
    """Returns once the head lists exactly that many living nodes."""
    code = "from ray._raylet import GcsClient; print(sum(node.state == 0 for node in "
    code += "GcsClient(address='127.0.0.1:6379').get_all_node_info(timeout=5).values()))"
    deadline = time.monotonic() + timeout_s
    while True:
        found = on_head(network, f'python -c "{code}"', check=False, timeout_s=60)
        if found.strip().endswith(str(num_nodes)):
            return
        if time.monotonic() > deadline:
            raise AssertionError(f"{found!r} instead of {num_nodes} nodes after {timeout_s:g} s")
        time.sleep(0.2)


def on_head(network: Network, script: str, *, timeout_s: float = 120.0, check: bool = True) -> str:
    """What a shell script prints on the head, in the environment of cluster.yaml."""
    head = network.hosts[0]
    script = f". ~/maas-ray.env && export RAY_ADDRESS={head.address}:6379 && {script}"
    return head.run(script, timeout_s=timeout_s, check=check).stdout


def _commands(key: str) -> list[str]:
    return list(yaml.safe_load(CLUSTER_YAML.read_text())[key])
