"""Requests in a stopped replica hung for 85 s, past the pool's limit of 20 s and the client's of 2 s."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from maas_ray.haproxy.admin import ask
from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.names import ADMIN_SOCKET, NOT_REPLAYABLE, REPLAYABLE
from maas_ray.haproxy.silent import silent
from tests.support.front import Front, body, until

LIMITS = PoolLimits(timeout_s=6.0, drain_s=6.0, max_body_bytes=1 << 20)


@pytest.fixture(params=[REPLAYABLE])
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Front]:
    front = Front(tmp_path, limits=LIMITS, deployment=request.param)
    try:
        front.manager().start()
        until(lambda: len({post(front)["pid"] for _ in range(6)}) == 2, "both replicas")
        yield front
    finally:
        front.close()


def post(front: Front, path: str = "x", **headers: str) -> dict[str, Any]:
    since = time.monotonic()
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    answer = requests.post(f"{front.url}/pool/{path}", data=b"1", timeout=40, headers=sent)
    return {"status": answer.status_code, "took_s": time.monotonic() - since, **body(answer)}


def at_once(
    front: Front, path: str, number: int, **headers: str
) -> tuple[list[threading.Thread], list[dict[str, Any]]]:
    answers: list[dict[str, Any]] = []
    callers = [threading.Thread(target=lambda: answers.append(post(front, path, **headers))) for _ in range(number)]
    for caller in callers:
        caller.start()
    return callers, answers


def join(callers: list[threading.Thread]) -> None:
    for caller in callers:
        caller.join(60)


def silence_one(front: Front) -> list[dict[str, Any]]:
    """Stops a replica that computes some of six requests; returns their responses."""
    callers, answers = at_once(front, "x?wait=0.5", 6)
    time.sleep(0.2)
    os.kill(front.replicas[0].pid, signal.SIGSTOP)
    join(callers)
    return answers


def test_a_silent_replica_leaves_the_rotation_until_it_continues(front: Front) -> None:
    answers = silence_one(front)
    assert [answer["status"] for answer in answers] == [200] * 6
    stopped, other = front.replicas
    for _ in range(6):
        answer = post(front)
        assert (answer["status"], answer["pid"]) == (200, other.pid)
        assert answer["took_s"] < 1
    os.kill(stopped.pid, signal.SIGCONT)
    until(lambda: post(front)["pid"] == stopped.pid, "the replica that continues")


def test_requests_in_a_silent_replica_are_answered_by_another(front: Front) -> None:
    answers = silence_one(front)
    assert [answer["status"] for answer in answers] == [200] * 6
    assert max(answer["took_s"] for answer in answers) < 5.5  # 3 s, its own 0.5 s, and a busy machine


def test_the_connections_to_a_killed_replica_are_left_alone(front: Front) -> None:
    """Its requests are about to be repeated when the checks notice; closing them would lose them."""
    os.kill(front.replicas[0].pid, signal.SIGKILL)
    callers, answers = at_once(front, "x?wait=2", 6)
    admin = front.directory / ADMIN_SOCKET

    def down() -> str:
        statistics = ask(admin, "show stat -1 4 -1") or ""
        return statistics if ",DOWN," in statistics else ""

    assert silent(until(down, "the check that notices")) == []
    join(callers)
    assert [answer["status"] for answer in answers] == [200] * 6
    assert "silent" not in front.log()


@pytest.mark.parametrize(
    ("status", "check", "reason", "current", "found"),
    [
        ("DOWN", "L7TOUT", "", 3, True),
        ("DOWN", "* L7TOUT", "", 3, True),
        ("DOWN 1/2", "L4TOUT", "", 1, True),
        ("DOWN", "L7TOUT", "", 0, False),
        ("DOWN", "L4CON", "Connection refused", 3, False),
        ("DOWN", "* L4CON", "", 3, False),
        ("DOWN", "L4CON", "General socket error (No route to host)", 3, True),
        ("DOWN", "L4CON", "General socket error (Network is unreachable)", 3, True),
        ("UP 1/2", "L4CON", "General socket error (No route to host)", 3, False),
        ("UP 1/2", "L7TOUT", "", 3, False),
        ("UP", "L7OK", "", 3, False),
    ],
)
def test_only_a_server_that_does_not_answer_its_checks_is_silent(
    status: str, check: str, reason: str, current: int, found: bool
) -> None:
    own, once = f"SERVE_REPLICA_pool-{REPLAYABLE}-a", f"SERVE_REPLICA_pool-{NOT_REPLAYABLE}-a"
    rows = [
        ("http-pool", own, current, status, check, reason),
        ("http-once", once, current, status, check, reason),
        ("reads-http-pool", own, current, f"{status} (via http-pool/{own})", "", ""),
    ]
    text = "# pxname,svname,scur,status,check_status,last_chk\n" + "\n".join(",".join(map(str, row)) for row in rows)
    assert [server.backend for server in silent(text)] == (["http-pool", "reads-http-pool"] if found else [])


@pytest.mark.parametrize("front", [NOT_REPLAYABLE], indirect=True)
def test_what_must_not_be_repeated_ends_with_the_callers_deadline_or_the_pools(front: Front) -> None:
    for replica in front.replicas:
        os.kill(replica.pid, signal.SIGSTOP)
    short, short_answers = at_once(front, "x", 2, x_request_timeout_ms="1000")
    longest, longest_answers = at_once(front, "x", 2)
    join(short + longest)
    assert [answer["status"] for answer in short_answers] == [504, 504]
    assert all(1 < answer["took_s"] < 3 for answer in short_answers)
    # Until a check notices, the pool's limit applies; later requests are refused immediately.
    assert {answer["status"] for answer in longest_answers} <= {503, 504}
    assert all(answer["took_s"] < 8 for answer in longest_answers)


def test_the_timeout_of_a_pool_is_its_own(front: Front) -> None:
    config = (front.directory / "haproxy.cfg").read_text()
    pool = config.split("backend http-pool\n")[1]
    assert "timeout server 6700ms" in pool
    assert post(front, "x?wait=7.5")["status"] == 504
    assert post(front, "x?wait=2", x_request_timeout_ms="60000")["status"] == 200  # asking for more changes nothing
