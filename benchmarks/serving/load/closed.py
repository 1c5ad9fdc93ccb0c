"""One closed-loop measurement, with wrk where it is installed: figures and how many sampled answers were wrong."""

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks.serving.load.client import Answer, make_request
from benchmarks.serving.load.generator import closed
from benchmarks.serving.workloads import Request, is_right

HOST = "127.0.0.1"
SAMPLE_EVERY_S = 0.2
"""Pause between two answers compared number by number while wrk runs."""
_SCRIPT = Path(__file__).with_name("report.lua")


def has_wrk() -> bool:
    """Whether wrk can be used; without it the generator in Python is, which needs far more of the CPU."""
    return shutil.which("wrk") is not None


def write_bodies(requests: Sequence[Request], directory: Path) -> list[str]:
    """Writes the bodies to files, and returns wrk's arguments for them."""
    arguments = ["application/json" if requests[0].header_length is None else "application/octet-stream"]
    for index, request in enumerate(requests):
        path = directory / f"body-{index}"
        path.write_bytes(request.body)
        arguments.append(f"{request.header_length or 0}={path}")
    return arguments


def ask(port: int, path: str, request: Request, timeout_s: float = 30.0) -> bool:
    """Sends one request on its own connection; whether its answer is right."""
    headers = {"content-type": "application/json"}
    if request.header_length is not None:
        headers = {
            "content-type": "application/octet-stream",
            "inference-header-content-length": str(request.header_length),
        }
    connection = HTTPConnection(HOST, port, timeout=timeout_s)
    try:
        connection.request("POST", path, request.body, headers)
        answer = connection.getresponse()
        length = answer.getheader("inference-header-content-length")
        return is_right(request, answer.status, answer.read(), int(length) if length else None)
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


def measure(
    port: int, path: str, requests: Sequence[Request], arguments: Sequence[str], *, clients: int, seconds: int
) -> dict[str, object]:
    """Load for `seconds` from `clients` connections, while some answers are compared number by number.

    Returns:
        Figures: `per_s` (answers with status 200 a second), `p50_s`, `p90_s`, `p99_s`, `failed`, `checked`, `wrong`.
    """
    if not has_wrk():
        return _with_python(port, path, requests, clients=clients, seconds=seconds)
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "10s", "-s", str(_SCRIPT)]
    command += [f"http://{HOST}:{port}{path}", "--", *arguments]
    ended = threading.Event()
    checks: list[bool] = []

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            checks.append(ask(port, path, requests[len(checks) % len(requests)]))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 30, check=True)
    finally:
        ended.set()
        sampler.join(40)
    line = next(line for line in finished.stdout.splitlines() if line.startswith("REPORT "))
    report = json.loads(line.removeprefix("REPORT "))
    return {
        "per_s": (report["answers"] - report["bad_status"]) / report["duration_s"],
        "p50_s": report["p50_s"],
        "p90_s": report["p90_s"],
        "p99_s": report["p99_s"],
        "failed": report["bad_status"] + report["broken"],
        "checked": len(checks),
        "wrong": checks.count(False),
    }


def _with_python(
    port: int, path: str, requests: Sequence[Request], *, clients: int, seconds: float
) -> dict[str, object]:
    def check(index: int, answer: Answer) -> bool:
        return is_right(requests[index], answer.status, answer.body, answer.header_length)

    sent = [make_request(HOST, port, path, request.body, request.header_length) for request in requests]
    tally = closed(HOST, port, sent, check, clients=clients, seconds=seconds)
    figures = tally.figures()
    kept = {name: figures[name] for name in ("per_s", "p50_s", "p90_s", "p99_s", "wrong")}
    failed = tally.failed + tally.refused + tally.refused_bare + tally.unanswered
    return kept | {"failed": failed, "checked": tally.right // 8}


def wait_until_right(port: int, path: str, requests: Sequence[Request], timeout_s: float = 60.0) -> None:
    """Asks each request until every answer is right.

    Raises:
        RuntimeError: some answer is still wrong after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    for index, request in enumerate(requests):
        while not ask(port, path, request):
            if time.monotonic() > deadline:
                raise RuntimeError(
                    f"request {index} to port {port}{path} was not answered right within {timeout_s:g} s"
                )
            time.sleep(0.2)
