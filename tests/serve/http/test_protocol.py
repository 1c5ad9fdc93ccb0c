"""Protocol class on real sockets: order, limits of time and number, and a stop that answers started requests."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import requests

from maas_ray.serve.http.protocol import MAX_PENDING_BYTES
from maas_ray.serve.http.server_state import MAX_REMEMBERED
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.serve.http.test_asgi_app import ROW, Hold
from tests.support.onnx_models import commit_bundle, linear

LIMITS = {"max_body_bytes": 1 << 20, "io_timeout_s": 1.0, "idle_timeout_s": 2.0, "max_connections": 4}


@pytest.fixture
def strict(file_store: ObstoreStore) -> Iterator[Server]:
    """Serves `linear` (y = 2x) with short times and few connections."""
    publish(file_store, "linear", commit_bundle(file_store, linear(2.0), run="run-a"))
    yield from serve_app(file_store, app_spec(file_store, "linear", limits=LIMITS), "protocol")


def request(value: float = 1.0, **headers: str) -> bytes:
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [value] * 3}]}).encode()
    lines = [f"{name.replace('_', '-')}: {text}" for name, text in {"host": "a", **headers}.items()]
    head = "\r\n".join(["POST /v2/models/linear/infer HTTP/1.1", *lines, f"content-length: {len(body)}", "", ""])
    return head.encode() + body


def connect(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=15)


def read_answers(sock: socket.socket, num_answers: int) -> list[tuple[int, bytes]]:
    """Status and body of this many responses, or of those received before the end."""
    data, answers = b"", []
    while len(answers) < num_answers:
        head, found, rest = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]) if found else 0
        if found and len(rest) >= length:
            answers.append((int(head.split()[1]), rest[:length]))
            data = rest[length:]
            continue
        if not (chunk := sock.recv(1 << 20)):
            break
        data += chunk
    return answers


def values(answers: list[tuple[int, bytes]]) -> list[float]:
    return [json.loads(body)["outputs"][0]["data"][0] for _, body in answers]


def test_requests_in_one_packet_are_answered_in_their_order(strict: Server) -> None:
    live = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n"
    with connect(strict) as sock:
        sock.sendall(b"".join([request(1), request(2), live, request(3), live, live, request(4)]))
        answers = read_answers(sock, 7)
    assert values([answers[index] for index in (0, 1, 3, 6)]) == [2.0, 4.0, 6.0, 8.0]
    assert [answers[index][1] for index in (2, 4, 5)] == [b'{"live":true}'] * 3


def test_a_request_cut_anywhere_is_the_same_request(strict: Server) -> None:
    whole = request(5)
    with connect(strict) as sock:
        for cut in range(1, len(whole), 7):
            sock.sendall(whole[:cut])
            time.sleep(0.001)
            sock.sendall(whole[cut:])
            assert values(read_answers(sock, 1)) == [10.0]


def test_a_caller_that_sends_much_more_than_it_reads_is_read_no_further(strict: Server) -> None:
    """Back-pressure: thousands of pipelined requests wait in the caller's socket, and are all answered in the end."""
    num_requests = 6000
    packet = b"".join(request(value) for value in range(num_requests))
    assert len(packet) > 10 * MAX_PENDING_BYTES
    with connect(strict) as sock:
        writer = threading.Thread(target=sock.sendall, args=(packet,))
        writer.start()
        answers = read_answers(sock, num_requests)
        writer.join(15)
    assert values(answers) == [2.0 * value for value in range(num_requests)]


def test_a_caller_that_waits_for_100_continue_gets_it(strict: Server) -> None:
    head, body = request(6, expect="100-continue").split(b"\r\n\r\n")
    with connect(strict) as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert values(read_answers(sock, 1)) == [12.0]


@pytest.mark.parametrize("method", [b"GET", b"HEAD"])
def test_a_half_closed_client_gets_the_responses_to_its_reads(strict: Server, method: bytes) -> None:
    ready = method + b" /v2/health/ready HTTP/1.1\r\nhost: a\r\n\r\n"
    with connect(strict) as sock:
        sock.sendall(ready * 3)
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
    assert answer.count(b"HTTP/1.1 200 OK") == 3, "all of them, then the end"


def test_what_follows_a_read_is_answered_too_and_a_cut_head_is_not(strict: Server) -> None:
    ready = b"GET /v2/health/ready HTTP/1.1\r\nhost: a\r\n\r\n"
    for data, num_answers in ((ready + request(4), 2), (ready + ready[:20], 1), (ready[:20], 0)):
        with connect(strict) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            assert len(read_answers(sock, 3)) == num_answers


def test_connection_close_is_honoured(strict: Server) -> None:
    with connect(strict) as sock:
        sock.sendall(request(7, connection="close"))
        assert len(read_answers(sock, 2)) == 1, "the second one meets the end"


def test_one_connection_too_many_is_a_503(strict: Server) -> None:
    held = [connect(strict) for _ in range(4)]
    try:
        for sock in held:
            sock.sendall(request())
            assert read_answers(sock, 1)[0][0] == 200
        with connect(strict) as sock:
            status, body = read_answers(sock, 1)[0]
        assert status == 503
        assert "limit of 4 connections" in json.loads(body)["error"]
    finally:
        for sock in held:
            sock.close()


def test_a_connection_that_trickles_or_rests_is_ended_with_its_reason(strict: Server) -> None:
    whole = request()
    cases = {"head": whole[:30], "body": whole[:-5], "idle": b""}
    expected = {"head": (408, "the head was not complete"), "body": (408, "of the body arrived"), "idle": None}
    with connect(strict) as head, connect(strict) as body, connect(strict) as idle:
        socks = {"head": head, "body": body, "idle": idle}
        for name, sock in socks.items():
            sock.sendall(cases[name])
        for name, sock in socks.items():
            answers = read_answers(sock, 1)
            if (wanted := expected[name]) is None:
                assert answers == [], "nothing was asked, so nothing is said"
            else:
                assert answers[0][0] == wanted[0]
                assert wanted[1] in json.loads(answers[0][1])["error"]
            assert sock.recv(100) == b"", "closed"


def test_a_large_slow_but_steady_body_is_read_and_one_that_stops_is_refused(strict: Server) -> None:
    head, _, body = request().partition(b"\r\n\r\n")
    body += b" " * (300_000 - len(body))
    whole = head.rpartition(b" ")[0] + b" %d\r\n\r\n" % len(body) + body
    with connect(strict) as steady, connect(strict) as stuck:
        stuck.sendall(whole[:150_000])
        for start in range(0, len(whole), 50_000):
            steady.sendall(whole[start : start + 50_000])
            time.sleep(0.5)  # in total three times the permitted pause of a body
        ((status, answer),) = read_answers(steady, 1)
        assert (status, json.loads(answer)["outputs"][0]["data"]) == (200, [2.0] * 3)
        steady.sendall(request(3))
        assert values(read_answers(steady, 1)) == [6.0], "small requests are again detected immediately"
        ((status, answer),) = read_answers(stuck, 1)
        assert status == 408
        assert "of the body arrived" in json.loads(answer)["error"]


def test_a_stop_answers_open_requests_and_closes_idle_connections(file_store: ObstoreStore) -> None:
    publish(file_store, "linear", commit_bundle(file_store, linear(2.0), run="run-a"))
    serving = serve_app(file_store, app_spec(file_store, "linear"), "protocol")
    server = next(serving)
    hold = Hold(server)
    with connect(server) as busy, connect(server) as resting:
        busy.sendall(request(3))
        hold.wait_busy()
        stopping = threading.Thread(target=lambda: list(serving))
        stopping.start()
        resting.settimeout(10)
        assert resting.recv(100) == b""
        hold.free()
        assert values(read_answers(busy, 1)) == [6.0]
        assert busy.recv(100) == b""
        stopping.join(30)
    assert not stopping.is_alive()


def test_heads_are_remembered_up_to_a_bound_and_never_for_another_path(strict: Server) -> None:
    url = f"{strict.url}/v2/models/linear"
    with requests.Session() as session:
        for number in range(MAX_REMEMBERED + 50):
            answer = session.post(f"{url}/versions/1/infer", json=ROW, headers={"x-number": str(number)}, timeout=15)
            assert answer.status_code == 200
        assert len(strict.front.heads) <= MAX_REMEMBERED  # type: ignore[union-attr]
        assert session.post(f"{url}/versions/2/infer", json=ROW, timeout=15).status_code == 404
