"""Training on several machines: one of them, or its cable, is lost while a run trains, and the run ends with the same bits."""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest

from maas_ray.store.objects import ObstoreStore, StorageSpec, open_store
from tests.support.hosts import Host, Network, ray_cluster
from tests.support.hosts.s3 import s3_service
from tests.support.hosts.trained import (
    LAYOUTS,
    Training,
    attempts,
    newest,
    ranks_on,
    redone,
    store_of,
    until,
    write_run,
)
from tests.support.runs import outcome

LOSE_EVERY_S = 30.0
RUN_S = 75.0
"""About as long as an undisturbed run is to train on this machine as busy as it is."""
NUM_CHECKPOINTS = 15


@dataclass(frozen=True)
class Reference:
    """Undisturbed runs of four ranks on two workers."""

    network: Network
    steps: int
    every: int
    """Steps between checkpoints."""
    rate: float
    """Steps per second."""
    outcomes: dict[str, tuple[list[tuple[int, float]], str]]
    """By layout: every logged loss, and the digest of weights and optimizer state."""

    def write(self, run: str, layout: str = "data", **changes: Any) -> None:
        fields = {"steps": self.steps, "every": self.every, "parallelism": LAYOUTS[layout], **changes}
        write_run(self.network, run, **fields)


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """A head without CPUs, and two workers of two."""
    secrets = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY") if name in os.environ}
    with Network(3) as found:
        ray_cluster.start(found, num_cpus=2, env=secrets, timeout_s=400)
        yield found


@pytest.fixture(scope="module")
def reference(network: Network) -> Reference:
    store, head = store_of(network), network.hosts[0]
    write_run(network, "probe", steps=400, every=400)
    with Training(network, head, "probe") as training:
        training.wait()
    seconds = step_seconds(store, "probe")
    every = max(20, round(RUN_S / seconds / NUM_CHECKPOINTS))
    outcomes = {}
    for layout, sizes in LAYOUTS.items():
        run = f"undisturbed-{layout.replace(' ', '-')}"
        write_run(network, run, steps=NUM_CHECKPOINTS * every, every=every, parallelism=sizes)
        with Training(network, head, run) as training:
            until(lambda run=run: newest(store, run), "checkpoint", training=training)
            assert [len(ranks_on(host)) for host in network.hosts] == [0, 2, 2]
            training.wait()
        outcomes[layout] = outcome(store, run)
    return Reference(network, NUM_CHECKPOINTS * every, every, 1 / seconds, outcomes)


def step_seconds(store: ObstoreStore, run: str) -> float:
    """Seconds that a step of a finished run took."""
    from maas_ray.checkpoint.catalog import open_checkpoint, read_saved
    from maas_ray.train.records.runs import checkpoints_prefix

    saved = read_saved(open_checkpoint(store, checkpoints_prefix(run)))
    return max(1e-4, saved.meta["seconds"]["training"] / saved.step)


def lose_and_boot(host: Host, away_s: float = 3.0) -> None:
    """A power cut: its neighbours are not told that its connections are gone."""
    host.cut()
    host.lose()
    time.sleep(away_s)
    host.boot()
    host.mend()


def check_same_bits(reference: Reference, store: ObstoreStore, run: str, layout: str = "data") -> None:
    assert outcome(store, run) == reference.outcomes[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_one_of_whose_hosts_is_lost_every_30_s_ends_with_the_same_bits(reference: Reference, layout: str) -> None:
    network, store, run = reference.network, store_of(reference.network), f"lost-{layout.replace(' ', '-')}"
    reference.write(run, layout)
    losses: list[int] = []
    with Training(network, network.hosts[0], run) as training:
        next_loss = time.monotonic() + LOSE_EVERY_S
        while not training.is_over:
            committed = newest(store, run)
            # Where a start alone takes so long, a loss each time would leave no time to train.
            if time.monotonic() >= next_loss and committed > (losses[-1] if losses else 0):
                lose_and_boot(network.hosts[1 + len(losses) % 2])
                losses.append(committed)
                next_loss = time.monotonic() + LOSE_EVERY_S
            time.sleep(0.2)
        assert training.wait()["step"] == reference.steps
    found = attempts(store, run)
    print(f"{len(losses)} losses, committed: {losses}; redone of {reference.every}: {redone(found)}; {found}")  # noqa: T201
    assert len(losses) >= 2, "the run was too short to prove anything"
    check_same_bits(reference, store, run, layout)
    # A commit that is in flight when a rank dies is lost with it: that is the second beside the interval.
    assert max(redone(found)) <= reference.every + reference.rate


def test_other_bits_are_noticed(reference: Reference) -> None:
    """The planted fault: one thing that must not change does, the seed."""
    store = store_of(reference.network)
    reference.write("seeded", seed=6)
    with Training(reference.network, reference.network.hosts[0], "seeded") as training:
        training.wait()
    with pytest.raises(AssertionError):
        check_same_bits(reference, store, "seeded")


@pytest.fixture
def s3(network: Network) -> Iterator[StorageSpec]:
    """A store in an S3 service on this machine, which all hosts reach."""
    with s3_service(network) as endpoint:
        client = boto3.client("s3", endpoint_url=endpoint)
        client.create_bucket(Bucket="maas")
        client.close()
        yield StorageSpec(uri="s3://maas/across", endpoint=endpoint)


def test_a_host_that_is_stopped_commits_first_and_is_used_again(reference: Reference, s3: StorageSpec) -> None:
    network, store = reference.network, open_store(s3)
    worker = network.hosts[1]
    reference.write("drained", storage=s3.model_dump(exclude_none=True))
    with Training(network, network.hosts[0], "drained") as training:
        until(lambda: newest(store, "drained"), "checkpoint", training=training)
        began_s = time.monotonic()
        worker.run("systemctl stop maas-ray", timeout_s=240)
        took_s = time.monotonic() - began_s
        committed = newest(store, "drained")
        assert 0 < committed < reference.steps
        worker.run("systemctl start maas-ray")
        training.wait()
    found = attempts(store, "drained")
    print(f"stopped in {took_s:.0f} s; {found}")  # noqa: T201
    assert "is draining" in found[0]["reason"]
    assert found[0]["reached"] == found[0]["committed"] == committed == found[1]["first_step"]
    check_same_bits(reference, store, "drained")


def test_a_run_whose_driver_s_host_is_lost_is_resumed_from_another_host(reference: Reference) -> None:
    network, store = reference.network, store_of(reference.network)
    _, driver, other = network.hosts
    reference.write("resumed")
    with Training(network, driver, "resumed") as training:
        until(lambda: newest(store, "resumed") >= 3 * reference.every, "progress", training=training)
        lose_and_boot(driver)
    committed = newest(store, "resumed")
    assert committed < reference.steps
    with Training(network, other, "resumed", "--resume") as training:
        training.wait()
    assert "is held by process" in training.said, "it has waited for a sign of life of the driver that is lost"
    check_same_bits(reference, store, "resumed")
    found = attempts(store, "resumed")
    assert found[-1]["first_step"] >= committed


def test_a_run_continues_while_the_head_is_down(reference: Reference) -> None:
    network, store = reference.network, store_of(reference.network)
    head, driver, _ = network.hosts
    reference.write("headless")
    with Training(network, driver, "headless") as training:
        until(lambda: newest(store, "headless") >= 3 * reference.every, "progress", training=training)
        before = newest(store, "headless")
        head.lose()
        until(lambda: newest(store, "headless") > before + reference.every, "progress", training=training)
        head.boot()
        training.wait()
    ray_cluster.wait_for_nodes(network, 3, 180)
    found = attempts(store, "headless")
    print(found)  # noqa: T201
    check_same_bits(reference, store, "headless")
    assert all(step <= reference.every + reference.rate for step in redone(found))


@pytest.mark.parametrize("away_s", [15.0, 60.0])
def test_a_run_survives_a_cable_that_is_pulled(reference: Reference, away_s: float) -> None:
    network, store = reference.network, store_of(reference.network)
    run = f"cut-{away_s:.0f}"
    reference.write(run)
    with Training(network, network.hosts[0], run) as training:
        until(lambda: newest(store, run) >= 3 * reference.every, "progress", training=training)
        network.hosts[1].cut()
        time.sleep(away_s)
        network.hosts[1].mend()
        training.wait()
    found = attempts(store, run)
    print(found)  # noqa: T201
    check_same_bits(reference, store, run)
    assert all(step <= reference.every + reference.rate for step in redone(found))
