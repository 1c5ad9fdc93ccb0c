"""Hosts whose shared memory or disk is too small or full: a start is refused, and what already serves continues."""

import json
from collections.abc import Iterator

import pytest

from tests.support.hosts import Host, Network
from tests.support.hosts.served import PORT, publish, statuses, write_spec

FILL = "fallocate -l $(( $(df --output=avail -B1 /tmp | tail -1) * 99 / 100 )) /tmp/ballast"


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(1) as found:
        yield found


def up(host: Host) -> str:
    """The output of `maas-ray up` on a host, whatever becomes of it."""
    return host.run(f"~/venv/bin/maas-ray up --host {host.address} --num-cpus 2 --port {PORT} --json", check=False, timeout_s=240).stdout  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "fill", "expected"),
    [
        ({"/dev/shm": "64m"}, "true", "/dev/shm has 64 MiB free: at least 142 MiB are needed"),
        ({"/tmp": "64m"}, FILL, "GiB free: Ray refuses work above 95%"),
    ],
    ids=["shared memory", "disk"],
)
def test_a_start_is_refused_without_enough_resources(network: Network, sizes: dict[str, str], fill: str, expected: str):
    host = network.hosts[0]
    host.lose()
    host.sizes.update(sizes)
    host.boot()
    host.run(fill)
    document = json.loads(up(host).strip().splitlines()[-1])
    assert expected in document["error"]["message"]
    assert host.pids("raylet") == host.pids("gcs_server") == []


def test_a_disk_that_becomes_full_stops_no_replica_and_the_doctor_names_it(network: Network):
    publish(network)
    host = network.hosts[0]
    up(host)
    try:
        host.run(f"~/venv/bin/maas-ray serve {write_spec(network)}", timeout_s=240)
        host.run(FILL)
        assert [statuses([host]) for _ in range(20)] == [[200]] * 20
        said = host.run("~/venv/bin/maas-ray doctor --json", check=False, timeout_s=120).stdout
        checks = {check["name"]: check for check in json.loads(said.strip().splitlines()[-1])["checks"]}
        assert not checks["room for Ray"]["ok"]
        host.run("rm /tmp/ballast")
        assert statuses([host]) == [200]
    finally:
        host.run("rm -f /tmp/ballast")
        host.run("~/venv/bin/maas-ray down --drain-timeout-s 0", timeout_s=120)
