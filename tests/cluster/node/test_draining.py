"""The drain of a front: accepted requests are answered, and each connection ends after an answer."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from maas_ray.cluster.node.draining import drain_fronts
from tests.support.front import Front, until


@pytest.fixture
def front(tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path, num_replicas=1)
    try:
        front.manager().start()
        until(front.answers, "an answer")
        until(lambda: (front.directory / "last-good.cfg").exists(), "the keeper's first look")
        yield front
    finally:
        front.close()


def test_requests_in_progress_are_answered_before_the_drain_ends(front: Front) -> None:
    outcomes: list[object] = []

    def call(path: str, again: bool) -> None:
        with requests.Session() as session:
            while True:
                try:
                    answer = session.post(f"{front.url}/pool/{path}", data=b"1", timeout=20)
                except requests.RequestException as error:
                    outcomes.append(error)
                    return
                outcomes.append(answer.status_code)
                if not again or answer.headers.get("connection") == "close":
                    return

    callers = [threading.Thread(target=call, args=("x?wait=1.5", False)) for _ in range(3)]
    callers += [threading.Thread(target=call, args=("x", True)) for _ in range(3)]
    for caller in callers:
        caller.start()
    time.sleep(0.5)
    since = time.monotonic()
    drain_fronts(front.directory.parent, timeout_s=20)
    took_s = time.monotonic() - since
    for caller in callers:
        caller.join(20)
    assert set(outcomes) == {200}
    assert 0.7 < took_s < 10
    with pytest.raises(requests.ConnectionError):
        requests.post(f"{front.url}/pool/x", data=b"1", timeout=5)


def test_a_drain_ends_in_time_although_a_request_does_not(front: Front) -> None:
    caller = threading.Thread(target=lambda: requests.post(f"{front.url}/pool/x?wait=4", data=b"1", timeout=20))
    caller.start()
    time.sleep(0.3)
    since = time.monotonic()
    drain_fronts(front.directory.parent, timeout_s=0.5)
    assert time.monotonic() - since < 2
    caller.join(20)


def test_without_a_front_the_drain_returns(tmp_path: Path) -> None:
    since = time.monotonic()
    drain_fronts(tmp_path, timeout_s=600)
    assert time.monotonic() - since < 60
