"""HAProxy or its manager died, and nothing listened for 40 s; then existing pools got 404 for some time."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from maas_ray.haproxy.keeper import START_S
from maas_ray.haproxy.succession import wake_keeper
from tests.support.front import Front, Manager, backend, body, until

WITHIN_S = 1.0
"""Until something listens again."""


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path, num_replicas=1)
    try:
        yield front
    finally:
        front.close()


def ready(front: Front) -> Manager:
    manager = front.manager()
    manager.start()
    until(front.keeper, "the keeper")
    until(front.answers, "an answer")
    until(lambda: (front.directory / "last-good.cfg").exists(), "the keeper's first look")
    return manager


def gap_s(front: Front, since: float) -> float:
    until(front.answers, "an answer after the death", 30, 0.005)
    return time.monotonic() - since


@pytest.mark.parametrize(
    "victims",
    [pytest.param("haproxy", marks=pytest.mark.fault), pytest.param("manager", marks=pytest.mark.fault), "both"],
)
def test_something_answers_within_a_second_of_a_death(front: Front, victims: str) -> None:
    manager = ready(front)
    first = manager.haproxy
    since = time.monotonic()
    if victims != "manager":
        os.kill(first, signal.SIGKILL)
    if victims != "haproxy":
        manager.process.kill()
    assert gap_s(front, since) < WITHIN_S
    assert (front.pid() == first) is (victims == "manager")

    # A manager that starts now has no HAProxy and no application: clients notice neither.
    successor = front.manager()
    failures: list[object] = []
    ended = threading.Event()
    caller = threading.Thread(target=call, args=(front, ended, failures))
    caller.start()
    before = front.pid()
    third = successor.start(pools=[])
    assert third != before
    time.sleep(0.3)
    fourth = successor.start()
    time.sleep(0.3)
    ended.set()
    caller.join(20)
    assert failures == []
    until(lambda: front.pid() == fourth, "the last HAProxy")
    assert front.answers()


def call(front: Front, ended: threading.Event, failures: list[object]) -> None:
    while not ended.is_set():
        try:
            answer = requests.post(f"{front.url}/pool/x", data=b"1", timeout=5)
            if answer.status_code != 200:
                failures.append((answer.status_code, answer.text))
        except requests.RequestException as error:
            failures.append(error)


def test_a_manager_that_can_reload_no_more_is_replaced(front: Front) -> None:
    manager = ready(front)
    os.kill(manager.haproxy, signal.SIGKILL)
    until(front.answers, "an answer after the death")
    assert manager.process.wait(20) == -signal.SIGKILL
    assert "cannot reload" in front.log()


@pytest.mark.fault
def test_an_haproxy_dies_again_and_again(front: Front) -> None:
    ready(front)
    for _ in range(3):
        pid, since = front.pid(), time.monotonic()
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        assert gap_s(front, since) < WITHIN_S
        until(lambda dead=pid: front.pid() not in (None, dead), "the next one")


@pytest.mark.fault
def test_an_haproxy_that_a_signal_stopped_continues(front: Front) -> None:
    manager = ready(front)
    os.kill(manager.haproxy, signal.SIGSTOP)
    since = time.monotonic()
    assert gap_s(front, since) < 5
    assert front.pid() == manager.haproxy


@pytest.mark.fault
def test_a_reload_by_the_manager_is_not_taken_for_a_death(front: Front) -> None:
    manager = ready(front)
    pids = [manager.haproxy, *(manager.start() for _ in range(3))]
    time.sleep(START_S + 2)  # past the time in which one that starts is waited for
    assert front.pid() == pids[-1]
    assert manager.process.poll() is None
    assert "has replaced it" not in front.log()


@pytest.mark.fault
def test_haproxy_ends_with_serve(front: Front) -> None:
    manager = ready(front)
    os.kill(manager.haproxy, signal.SIGKILL)  # Serve's own shutdown: HAProxy, its manager, then the replicas
    manager.process.kill()
    until(front.answers, "an answer while the replicas end")
    for replica in front.replicas:
        replica.kill()
    until(lambda: not front.keeper(), "the end of the keeper", 60)
    until(lambda: front.pid() is None, "the end of HAProxy")
    assert not (front.directory / "last-good.cfg").exists()


def test_the_front_returns_503_before_the_first_application_and_404_only_then(front: Front) -> None:
    manager = front.manager()
    manager.start(pools=[])
    answer = requests.post(f"{front.url}/pool/v2/models/m/infer", data=b"1", timeout=5)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/json"
    assert "starting" in body(answer)["error"]
    manager.start([backend("other", "maas_replica", front.ports)])
    until(lambda: requests.get(f"{front.url}/pool/x", timeout=5).status_code == 404, "a 404")
    answer = requests.get(f"{front.url}/pool/x", timeout=5)
    assert "no pool is served at this path" in body(answer)["error"]


def test_a_drained_front_gives_each_connection_a_last_answer_and_is_not_started_again(front: Front) -> None:
    ready(front)
    with requests.Session() as session:
        assert "close" not in session.post(f"{front.url}/pool/x", data=b"1", timeout=5).headers.get("connection", "")
        assert wake_keeper(front.directory, b"drain")
        time.sleep(0.5)
        last = session.post(f"{front.url}/pool/x", data=b"1", timeout=5)
        assert (last.status_code, last.headers["connection"]) == (200, "close")
    until(lambda: not front.keeper(), "the end of the keeper")
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{front.url}/pool/x", data=b"1", timeout=5)
