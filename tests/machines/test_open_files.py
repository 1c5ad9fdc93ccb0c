"""A node whose processes may open few files has a front with fewer connections, and one that cannot start says why."""

import json
from collections.abc import Iterator

import pytest

from tests.support.hosts import Network, ray_cluster
from tests.support.hosts.ray_cluster import on_head
from tests.support.hosts.served import publish, serve, statuses, write_spec

FEW, TOO_FEW = 2048, 200
LAUNCHER = """#!/bin/sh
ulimit -n "$(cat ~/open-files)"
exec ~/venv/bin/maas-ray-haproxy "$@"
"""


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """The front of the second host gets the limit that a file says, as in a container."""
    with Network(2) as found:
        publish(found)
        for host in found.hosts:
            ray_cluster.prepare(host)
        other = found.hosts[1]
        program = other.home / "bin" / "maas-ray-haproxy"
        program.parent.mkdir()
        program.write_text(LAUNCHER)
        program.chmod(0o755)
        with (other.home / "maas-ray.env").open("a") as file:
            file.write("export RAY_SERVE_HAPROXY_BINARY_PATH=/home/maas/bin/maas-ray-haproxy\n")
        (other.home / "open-files").write_text(str(TOO_FEW))
        for host in found.hosts:
            ray_cluster.start_node(found, host, num_cpus=2 if host is other else 0)
        ray_cluster.wait_for_nodes(found, 2, 180)
        yield found


def test_a_front_that_cannot_start_is_named_with_the_reason_and_starts_with_more_files(network: Network):
    other = network.hosts[1]
    said = on_head(network, f"maas-ray serve {write_spec(network)} 2>&1", check=False, timeout_s=300)
    assert f"HAProxy may have {TOO_FEW} open files, which is too few" in said
    assert other.address in said
    (other.home / "open-files").write_text(str(FEW))
    serve(network, write_spec(network))
    assert statuses(network.hosts) == [200, 200]
    document = json.loads(on_head(network, "maas-ray doctor --json", check=False).strip().splitlines()[-1])
    found = {check["name"]: check["detail"] for check in document["checks"]}
    assert f"because it may have {FEW} open files" in found[f"connections of node {other.address}"]
