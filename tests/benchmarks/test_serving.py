"""The benchmark's own arithmetic: tables from fixed figures, and load against a server with scripted answers."""

import json
import socket
import socketserver
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures import median_interval
from benchmarks.serving import commits, costs, table, workloads
from benchmarks.serving.load.client import Answer, make_request
from benchmarks.serving.load.flood import open_loop
from benchmarks.serving.load.generator import Tally, closed, quantile


def make_point(workload: str, peer: str, clients: int, *pairs: tuple[float, float], ours: str = "maas") -> dict:
    def side(per_s: float) -> dict:
        return {"per_s": per_s, "p50_s": 1 / per_s, "p99_s": 2 / per_s, "failed": 0, "wrong": 0}

    return {
        "workload": workload, "ours": ours, "peer": peer, "clients": clients,
        "pairs": [{ours: side(our), peer: side(other)} for our, other in pairs],
    }  # fmt: skip


RESULTS = {
    "date": "2030-01-01", "machine": {"cpus": 2, "cpu": "x"}, "versions": {"triton": {"nvidia-pytriton": "0.7.0"}},
    "settings": {"pairs": 3, "seconds": 4, "load": "wrk"}, "engine_run_s": 0.0002,
    "points": [
        make_point("tiny", "triton", 1, (2000.0, 1000.0)),
        make_point("tiny", "triton", 32, (100.0, 100.0), (300.0, 100.0), (250.0, 100.0)),
        make_point("tiny", "mlserver", 32, (500.0, 100.0)),
        make_point("tiny", "litserve", 32, (500.0, 250.0)),
        make_point("tiny", "sketch-replica", 32, (90.0, 100.0), (80.0, 100.0), (95.0, 100.0)),
        make_point("tiny", "sketch", 32, (70.0, 100.0), ours="maas-direct"),
    ],
    "overload": {"rounds": [{
        "peak_per_s": 100.0,
        "2": {"goodput_per_s": 95.0, "refused": 80, "refused_bare": 0, "refused_within_50_ms": 1.0},
        "10": {"goodput_per_s": 50.0, "refused": 300, "refused_bare": 100, "refused_within_50_ms": 0.8},
    }]},
    "memory": {"rss_bytes": 250e6, "uss_bytes": 100e6, "has_torch": False},
}  # fmt: skip
FIGURES = {figure.name: figure for figure in table.FIGURES}


@pytest.mark.parametrize(
    ("name", "median", "least", "greatest", "verdict"),
    [
        ("tiny JSON, req/s against Triton, 32 clients", 2.5, 1.0, 3.0, "aim"),
        ("tiny JSON against the best of MLServer, LitServe, BentoML, 32 clients", 2.0, 2.0, 2.0, "missed"),
        ("cost of every duty against the bare sketch, 32 clients", 0.1, 0.05, 0.2, "reached"),
        ("the same without HAProxy and Ray, 32 clients", 0.3, 0.3, 0.3, "missed"),
        ("tiny JSON, p99 against Triton's, 32 clients", 0.4, 1 / 3, 1.0, "aim"),
        ("lone request, p50 minus engine run", 0.0003, 0.0003, 0.0003, "reached"),
        ("goodput of peak at 2 x capacity", 0.95, 0.95, 0.95, "reached"),
        ("goodput of peak at 10 x capacity", 0.5, 0.5, 0.5, "missed"),
        ("refusals with Retry-After within 50 ms at 10 x capacity", 0.6, 0.6, 0.6, "missed"),
        ("replica's resident memory", 250e6, 250e6, 250e6, "reached"),
    ],
)
def test_a_figure_is_the_median_of_the_pairs_ratios(
    name: str, median: float, least: float, greatest: float, verdict: str
) -> None:
    found = FIGURES[name].find(RESULTS)
    assert found is not None
    assert (found.median, found.least, found.greatest) == pytest.approx((median, least, greatest))
    assert FIGURES[name].verdict(found.median) == verdict


def test_the_table_shows_what_was_measured_and_leaves_the_rest_out() -> None:
    text = table.markdown(RESULTS)
    assert "| tiny JSON, req/s against Triton, 32 clients | 1.2 | 2 | 2.5 (1–3) | aim |" in text
    assert "| tiny | 32 | maas | triton | 250 (100–300) | 100 (100–100) | 2.50 (1.00–3.00) |" in text
    assert "mid MLP" not in text
    assert "failed" not in text
    assert "NOT TO BE TRUSTED" not in text


def test_the_table_warns_when_the_machine_was_busy_with_something_else() -> None:
    point = make_point("tiny", "triton", 8, (2.0, 1.0)) | {"foreign_cpus": 0.7}
    assert "other programs used up to 0.7 CPUs" in table.markdown({"points": [point]})


def test_the_table_shows_failures_and_wrong_answers() -> None:
    point = make_point("tiny", "triton", 8, (2.0, 1.0))
    point["pairs"][0]["triton"]["wrong"] = 3
    assert "triton failed or answered wrongly 3 times" in table.markdown({"points": [point]})


@pytest.mark.parametrize(
    ("ratios", "cost", "verdict"),
    [
        ((0.98, 1.0, 0.99), 1.0, "| kept |"),
        ((0.98, 0.9, 0.9), 1.0, "| NOT KEPT |"),
        ((1.0, 1.0, 1.0), 1.1, "| NOT KEPT |"),
    ],
)
def test_the_table_shows_whether_a_change_kept_the_speed(ratios: tuple[float, ...], cost: float, verdict: str) -> None:
    point = make_point("tiny", "ours@old", 32, *((100 * ratio, 100.0) for ratio in ratios))
    for pair in point["pairs"]:
        pair["maas"]["cpu_us"], pair["ours@old"]["cpu_us"] = 80 * cost, 80
    text = table.markdown({"points": [point], "revisions": {"maas": "bbb", "ours@old": "aaa"}})
    assert f"| tiny | 32 | old (aaa) | {100 * sorted(ratios)[1]:.0f}" in text
    assert (
        f"| {sorted(ratios)[1]:.3f} ({min(ratios):.3f}–{max(ratios):.3f}) | {cost:.3f} ({cost:.3f}–{cost:.3f}) {verdict}"
        in text
    )


@pytest.mark.parametrize(
    ("count", "cut"),
    [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (21, 5), (100, 39)],  # of the sign test's tables
)
def test_the_median_is_within_its_interval_with_the_stated_probability(count: int, cut: int) -> None:
    assert median_interval(float(value) for value in range(count)) == (cut, count - 1 - cut)


def test_another_commit_runs_its_own_code_with_its_own_programs(tmp_path: Path) -> None:
    checkout, directory = tmp_path / "checkout", tmp_path / "side"
    (checkout / "maas_ray").mkdir(parents=True)
    directory.mkdir()
    (checkout / "maas_ray" / "__init__.py").write_text("import numpy\n\n\ndef main():\n    print('the other one')\n")
    project = (commits.ROOT / "pyproject.toml").read_text()
    (checkout / "pyproject.toml").write_text(project.replace('"maas_ray.cli:main"', '"maas_ray:main"'))
    code = commits.other(f"ours@{checkout}", directory, tmp_path / "cache")
    said = subprocess.run([code.python.parent / "maas-ray"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert said.stdout == "the other one\n", said.stderr
    assert not (tmp_path / "cache").exists(), "ours has what it needs, so nothing is installed"


@pytest.mark.bench
def test_the_hot_path_alone_answers_in_every_variant(tmp_path: Path) -> None:
    tiny = workloads.WORKLOADS["tiny"]
    model = workloads.make_model(tiny, tmp_path)
    (tmp_path / "body").write_bytes(workloads.make_requests(tiny, model, 1)[0].body)
    with costs.worker(commits.here(), model, tmp_path / "body", tmp_path / "work") as worker:
        variants = {variant for pair in costs.DUTIES.values() for variant in pair}
        assert all(0 < worker.cpu_us(variant, 32) < 10_000 for variant in variants)
    assert worker.exit_code == 0


@pytest.mark.parametrize(
    ("requirement", "is_installed"),
    [
        ("numpy", True), ("numpy>=1", True), ("numpy<1", False), ("no-such-package-of-ours", False),
        ("no-such-package-of-ours; sys_platform == 'none'", True), ("ray[serve,train]", True),
    ],
)  # fmt: skip
def test_another_commit_shares_an_environment_with_the_same_dependencies(requirement: str, is_installed: bool) -> None:
    assert commits.is_installed(requirement) is is_installed


def test_another_commit_that_there_is_not_is_refused_before_anything_starts() -> None:
    with pytest.raises(ValueError, match="'none-such' is neither a directory with a checkout nor a revision"):
        commits.check("ours@none-such")


@pytest.mark.parametrize(
    ("values", "share", "found"), [([], 0.5, None), ([3.0, 1.0, 2.0], 0.5, 2.0), ([1.0], 0.99, 1.0)]
)
def test_quantiles(values: list[float], share: float, found: float | None) -> None:
    assert quantile(values, share) == found


REFUSAL = b"HTTP/1.1 503 x\r\nRetry-After: 1\r\ncontent-length: 2\r\n\r\n{}"
BARE = b"HTTP/1.1 503 x\r\ncontent-length: 0\r\n\r\n"
GONE = b""
LATE = b"HTTP/1.1 504 x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


def right(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def chunked(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


@contextmanager
def answering(*script: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A server that returns the answers of `script` in turn, endlessly; an empty one ends the connection."""
    given: list[bytes] = []
    turn = threading.Lock()

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):
                while self.answer():
                    pass

        def answer(self) -> bool:
            length = 0
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                name, _, value = line.lower().partition(b": ")
                length = int(value) if name == b"content-length" else length
            if not line or len(self.rfile.read(length)) < length:
                return False
            with turn:
                answer = script[len(given) % len(script)]
                given.append(answer)
            for part in (answer[:20], answer[20:]):
                self.wfile.write(part)
            return bool(answer)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = False  # so that server_close() waits for every handler
        request_queue_size = 100

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server.server_address[1], given
        finally:
            server.shutdown()
            thread.join(10)


def check(_: int, answer: Answer) -> bool:
    return answer.body == b"right"


def assert_counts(tally: Tally, given: list[bytes]) -> None:
    num_right = sum(answer.endswith((b"right", b"right\r\n0\r\n\r\n")) for answer in given)
    assert (tally.right, tally.wrong) == (num_right, given.count(right(b"wrong")))
    assert (tally.refused, tally.refused_bare) == (given.count(REFUSAL), given.count(BARE))
    assert tally.failed == given.count(LATE) + given.count(GONE)
    assert tally.sent == len(given)
    assert tally.unanswered == 0


SCRIPT = (right(b"right"), REFUSAL, right(b"wrong"), chunked(b"right"), BARE, LATE, right(b"right"), GONE)


def test_the_closed_loop_counts_each_answer_for_what_it_is() -> None:
    with answering(*SCRIPT) as (port, given):
        request = make_request("127.0.0.1", port, "/x", b"body")
        tally = closed("127.0.0.1", port, [request], check, clients=3, seconds=0.3, check_every=1)
    assert_counts(tally, given)
    assert min(tally.right, tally.wrong, tally.refused, tally.refused_bare, tally.failed) > 0
    figures = json.loads(json.dumps(tally.figures(1.0)))
    assert figures["goodput_per_s"] == pytest.approx((tally.right - len(tally.outside)) / tally.duration_s)
    assert figures["statuses"]["503"] == tally.refused + tally.refused_bare


@pytest.mark.parametrize("poisson", [True, False])
def test_the_open_loop_sends_at_its_rate_for_any_response(poisson: bool) -> None:
    with answering(*SCRIPT) as (port, given):
        request = make_request("127.0.0.1", port, "/x", b"body", None, {"x-more": "1"})
        tally = open_loop("127.0.0.1", port, [request], check, per_s=300, seconds=0.5, poisson=poisson, check_every=1)
    assert_counts(tally, given)
    assert tally.sent == 150 if not poisson else 100 < tally.sent < 200
    assert len(tally.late_s) == tally.sent


def test_what_is_answered_before_the_window_counts_for_no_rate() -> None:
    with answering(right(b"right")) as (port, _):
        request = make_request("127.0.0.1", port, "/x", b"body")
        opened = open_loop("127.0.0.1", port, [request], check, per_s=200, seconds=0.2, warm_s=0.3, poisson=False)
        looped = closed("127.0.0.1", port, [request], check, clients=2, seconds=0.2, warm_s=0.3)
    assert (opened.sent, opened.right) == (100, 100)
    assert len(opened.outside) >= 55, "60 were due before the window"
    for tally in (opened, looped):
        assert tally.duration_s == 0.2
        assert 0 < len(tally.outside) < tally.right
        assert tally.figures(1.0)["per_s"] == pytest.approx((tally.right - len(tally.outside)) / 0.2)


def test_the_open_loop_does_not_wait_for_a_silent_server() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent:
        port = silent.getsockname()[1]
        request = make_request("127.0.0.1", port, "/x", b"body")
        tally = open_loop(
            "127.0.0.1",
            port,
            [request],
            check,
            per_s=200,
            seconds=0.2,
            timeout_s=0.1,
            max_connections=10,
            poisson=False,
        )
    assert tally.sent == 40
    assert tally.unanswered == 10
    assert tally.statuses[-1] == tally.failed == 30, "no connection was left for the others"


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ({"outputs": [{"name": "y", "shape": [1, 2], "data": [1.0, 2.0]}]}, True),
        ([{"outputs": [{"name": "y", "shape": [1, 2], "data": [[1.0, 2.0]]}]}], True),
        ({"outputs": [{"name": "y", "shape": [1, 2], "data": [1.0, 2.1]}]}, False),
        ({"outputs": [{"name": "y", "shape": [2, 1], "data": [1.0, 2.0]}]}, False),
        ({"outputs": []}, False),
        ({"error": "x"}, False),
    ],
)
def test_an_answer_is_right_only_with_the_numbers_of_its_request(answer: object, is_right: bool) -> None:
    request = workloads.Request(b"", None, np.float32([[0.0]]), np.float32([[1.0, 2.0]]))
    assert workloads.is_right(request, 200, json.dumps(answer).encode(), None) == is_right
    assert not workloads.is_right(request, 500, json.dumps(answer).encode(), None)


def test_a_binary_answer_is_compared_too() -> None:
    request = workloads.Request(b"", None, np.float32([[0.0]]), np.float32([[1.0, 2.0]]))
    header = json.dumps({"outputs": [{"name": "y", "shape": [1, 2], "parameters": {"binary_data_size": 8}}]}).encode()
    assert workloads.is_right(request, 200, header + np.float32([1, 2]).tobytes(), len(header))
    assert not workloads.is_right(request, 200, header + np.float32([2, 1]).tobytes(), len(header))
