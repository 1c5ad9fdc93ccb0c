"""Workers begun by a run's actor: joined to one group, and ended with what they hold when their driver gives up."""

import threading
import time

import pytest
import ray

from maas_ray.errors import TrainingFailed
from maas_ray.store.objects import ObstoreStore, StorageSpec
from maas_ray.train.ranks.process_group import free_address
from maas_ray.train.ranks.run_actor import TIMEOUT_S, end_run_actor, start_run_actor
from maas_ray.train.run import run_training
from tests.conftest import RayCluster
from tests.support.paths import digits_spec


@pytest.mark.parametrize(("host", "begin"), [("127.0.0.1", "127.0.0.1:"), ("::1", "[::1]:")])
def test_rank_0_is_given_a_port_that_is_free(host: str, begin: str) -> None:
    address = free_address(host)
    assert address.startswith(begin)
    assert 0 < int(address.rpartition(":")[2]) < 2**16


@pytest.mark.fault
def test_a_driver_that_gives_up_frees_what_its_workers_hold(file_store: ObstoreStore, ray_cluster: RayCluster) -> None:
    total = ray.cluster_resources()["CPU"]
    spec = digits_spec(StorageSpec(uri=file_store.uri), "r", epochs=None, steps=1_000_000, log_every=1)
    actor = start_run_actor()
    raised: list[BaseException] = []

    def train() -> None:
        try:
            run_training(spec, actor=actor)
        except TrainingFailed as error:
            raised.append(error)

    training = threading.Thread(target=train)
    training.start()
    deadline = time.monotonic() + 120
    while ray.get(actor.newest.remote(), timeout=TIMEOUT_S) == [] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources().get("CPU", 0.0) < total, "the workers hold CPUs while they train"
    end_run_actor(actor)
    training.join(timeout=60)
    assert "lost the actor that monitors its workers" in str(raised[0])
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0.0) < total and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == total
