"""Commands that start, join and end parts of a cluster of several machines end in order when a signal asks them to."""

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hosts import Host, Network

UP = "up --host {address} --num-cpus 1"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as found:
        yield found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_head_that_is_interrupted_while_it_starts_leaves_nothing(network: Network, number: int):
    head = network.hosts[0]
    assert interrupted(head, UP.format(address=head.address), "raylet", number) == 128 + number
    assert left(head) == []
    assert "all started processes have ended" in (head.home / "said.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_machine_that_is_interrupted_while_it_joins_leaves_nothing(network: Network, number: int):
    head, other = network.hosts
    head.run(f"~/venv/bin/maas-ray {UP.format(address=head.address)}", timeout_s=180)
    try:
        state = json.loads((head.home / ".maas-ray" / "cluster.json").read_text())
        (network.shared / "token").write_text((head.home / ".maas-ray" / "token").read_text())
        words = f"up --address {state['address']} --token-file {network.shared}/token --num-cpus 1"
        assert interrupted(other, words, "raylet", number) == 128 + number
        assert left(other) == []
        # And nothing is in the way of the next one.
        other.run(f"~/venv/bin/maas-ray {words}", timeout_s=180)
        other.run("~/venv/bin/maas-ray down", timeout_s=180)
        assert left(other) == []
    finally:
        head.run("~/venv/bin/maas-ray down --drain-timeout-s 0", timeout_s=180)
        other.run("~/venv/bin/maas-ray down --drain-timeout-s 0", timeout_s=180, check=False)


def interrupted(host: Host, words: str, after: str | None, number: int) -> int:
    """Runs a command, signals it once a process of this name is there, and returns its exit code."""
    running = host.start(f"exec ~/venv/bin/maas-ray {words}", "said.log")
    deadline = time.monotonic() + 120
    while not (host.pids(after) if after else host.pids("maas-ray", words)):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.05)
    time.sleep(0.3)
    for pid in host.pids("/venv/bin/maas-ray", words.split()[0]):
        if "nsenter" not in Path(f"/proc/{pid}/cmdline").read_text():
            os.kill(pid, number)
    return running.wait(180)


def left(host: Host) -> list[str]:
    """Command lines of Ray's processes on a host."""
    found = {pid for word in ("raylet", "gcs_server", "ray::", "dashboard") for pid in host.pids(word)}
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")[:200] for pid in sorted(found)]
