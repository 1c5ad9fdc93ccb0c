"""A real cluster on this machine with more and more replicas of a trivial pool: CPU of each process that grows with them."""

import argparse
import http.client
import os
import tempfile
import time
from pathlib import Path

import ray

from benchmarks.scale import cpu

SETTLE_S = 10.0
WATCHED_S = 30.0
CHECKS = 2000
_TITLES = {"controller": "ray::ServeController", "manager": "ray::HAProxyManager", "replica": "ray::ServeReplica"}


def pids() -> dict[str, list[int]]:
    """Processes of this cluster by what they are; the cluster's own environment tells them from others'."""
    found: dict[str, list[int]] = {name: [] for name in (*_TITLES, "haproxy", "keeper", "gcs_server", "raylet")}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            command = (path / "cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            if os.environ["RAY_AUTH_TOKEN_PATH"].encode() not in (path / "environ").read_bytes():
                continue
        except OSError:
            continue
        for name, title in _TITLES.items():
            if command.startswith(title):
                found[name].append(int(path.name))
        program = Path(command.split(" ")[0]).name
        if program in ("haproxy", "gcs_server", "raylet"):
            found[program].append(int(path.name))
        if "-m maas_ray.haproxy.keeper" in command:
            found["keeper"].append(int(path.name))
    return found


def shares(found: dict[str, list[int]], watched_s: float = WATCHED_S) -> dict[str, float]:
    """Percent of a core that the processes of each kind take, all of a kind together."""
    before, began = {pid: cpu.of_process(pid) for ids in found.values() for pid in ids}, time.monotonic()
    time.sleep(watched_s)
    span_s = time.monotonic() - began
    return {name: sum(cpu.of_process(pid) - before[pid] for pid in ids) / span_s * 100 for name, ids in found.items()}


def health_check_us(pid: int, port: int) -> float:
    """Microseconds of a replica's CPU for one health check over a connection of its own, as HAProxy asks."""
    idle = shares({"replica": [pid]}, 10.0)["replica"] / 100
    before, began = cpu.of_process(pid), time.monotonic()
    for _ in range(CHECKS):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("GET", "/-/healthz")
        answer = connection.getresponse()
        if (answer.status, answer.read()) != (200, b"success"):
            raise RuntimeError(f"a replica answered {answer.status}")
        connection.close()
    return max(0.0, cpu.of_process(pid) - before - idle * (time.monotonic() - began)) / CHECKS * 1e6


def watch(what: str) -> dict[str, list[int]]:
    """Prints a line with the share of a core of each kind of process; returns the processes."""
    time.sleep(SETTLE_S)
    found = pids()
    line = ", ".join(f"{name} {share:.2f} %" for name, share in shares(found).items())
    print(f"{what}, {len(found['replica'])} replicas: {line}", flush=True)
    return found


def deploy(number: int, max_replicas: int | None, uri: str, port: int) -> None:
    """Serves a trivial model with so many replicas, or with at least so many and at most `max_replicas`."""
    from maas_ray.serve.deploy import pool
    from maas_ray.serve.spec.serve import ServeSpec

    one = {
        "name": "one", "models": [{"name": "linear"}], "resources": {"cpus": 1},
        "replicas": {"min": number, "max": max_replicas} if max_replicas else number,
    }  # fmt: skip
    spec = {"storage": {"uri": uri}, "http": {"host": "127.0.0.1", "port": port}, "pools": [one]}
    pool.deploy(ServeSpec.model_validate(spec))


def measure(options: argparse.Namespace) -> None:
    """First more and more replicas, then more and more nodes beside them."""
    from maas_ray.registry.models import Registry
    from maas_ray.store.objects import open_store
    from tests.support.nodes import more_nodes
    from tests.support.onnx_models import commit_bundle, linear
    from tests.support.own_cluster import own_cluster

    with (
        tempfile.TemporaryDirectory() as directory,
        own_cluster(num_cpus=64) as own,
        more_nodes(own, Path(directory)) as nodes,
    ):
        uri = f"file://{directory}/store"
        store = open_store(uri)
        Registry(store).publish("linear", commit_bundle(store, linear()))
        Registry(store).promote("linear", 1)
        for number in options.replicas:
            deploy(number, options.max_replicas, uri, own.http_port)
            found = watch("1 node")
        ports = own.env
        first, last = (int(ports[f"RAY_SERVE_DIRECT_INGRESS_{end}_HTTP_PORT"]) for end in ("MIN", "MAX"))
        for port in range(first, last):
            if (replica := _owner(port, found["replica"])) is not None:
                print(f"a health check: {health_check_us(replica, port):.0f} us of the replica")
                break
        for number in options.nodes:
            while sum(node["Alive"] for node in ray.nodes()) < number:
                nodes.add(0)
            watch(f"{number} nodes")


def _owner(port: int, candidates: list[int]) -> int | None:
    """The process that listens on a port of loopback."""
    inodes = {
        row.split()[9] for row in Path("/proc/net/tcp").read_text().splitlines()[1:]
        if row.split()[3] == "0A" and row.split()[1].endswith(f":{port:04X}")
    }  # fmt: skip
    for pid in candidates:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            try:
                if os.readlink(descriptor).removeprefix("socket:[").removesuffix("]") in inodes:
                    return pid
            except OSError:
                continue
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale.real_cluster", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--max-replicas", type=int, help="makes the pool one that is scaled, up to so many")
    parser.add_argument("--nodes", type=int, nargs="*", default=[])
    measure(parser.parse_args())
