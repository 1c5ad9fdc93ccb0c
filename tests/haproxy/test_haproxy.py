"""Hardened HAProxy: every edit of the configuration that Serve writes, and the real program with servers that die."""

import fcntl
import hashlib
import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import requests
from ray.serve._private.common import RequestProtocol
from ray.serve.config import gRPCOptions

from maas_ray.cluster.node.environment import find_launcher
from maas_ray.haproxy import silent
from maas_ray.haproxy.binary import find_binary
from maas_ray.haproxy.config.capacity import Capacity
from maas_ray.haproxy.config.harden import MARK, MIN_HARD_STOP_S, PIPE_BYTES, Options, harden
from maas_ray.haproxy.config.limits import PoolLimits, read_limits, write_limits
from maas_ray.haproxy.config.pools import MAX_CHECKS_PER_S
from maas_ray.haproxy.config.sections import Unexpected
from maas_ray.haproxy.launcher import apply
from maas_ray.haproxy.names import HOST_FILE_VARIABLE, NOT_REPLAYABLE, REASON_FILE, REPLAYABLE
from tests.conftest import unused_port
from tests.support.front import backend, render

BIG = 200_000
"""Bytes of a body that fits no buffer."""


POOLS = [
    backend("twice", REPLAYABLE, [9001, 9002]),
    backend("once", NOT_REPLAYABLE, [9003]),
    backend("foreign", "app", [9004]),
    backend("likewise", f"my-{REPLAYABLE}", [9005]),
    backend("asleep", REPLAYABLE, []),
]


def section(config: str, header: str) -> str:
    return re.split(r"\n(?=\S)", config.split(f"\n{header}\n")[1])[0]


def test_every_edit_is_made_in_what_serve_renders(tmp_path: Path) -> None:
    config = harden(
        render(tmp_path, POOLS),
        Options(error_files={503: Path("/errors/503.http")}, capacity=Capacity(900, 20_000, 2048, 60)),
    )
    for line in (
        " mode 600 level admin",
        f"    tune.pipesize {PIPE_BYTES}\n",
        "    maxpipes 60\n",
        "    maxconn 900\n",
    ):
        assert line in section(config, "global")
    defaults = section(config, "defaults")
    for line in (
        "timeout http-request 8s",
        "errorfile 503 /errors/503.http",
        "timeout check 1100ms",
    ):
        assert f"    {line}" in defaults
    assert "httplog" not in config
    assert not re.search(r"^\s+log ", config, re.MULTILINE)
    assert re.findall(r"bind (\S+):\d+", config) == ["127.0.0.1", "127.0.0.1", "127.0.0.1"]
    assert "del-header x-request-timeout-seconds" in section(config, "frontend http_frontend")
    assert "text/plain lf-string" not in config
    repeats = {name: "empty-response" in section(config, f"backend http-{name}") for name in ("twice", "once", "foreign", "likewise", "asleep")}  # fmt: skip
    assert repeats == {"twice": True, "once": False, "foreign": False, "likewise": False, "asleep": False}
    assert "empty-response" not in defaults
    assert harden(config, Options()) == config


@pytest.mark.parametrize("line", ["stats socket", "mode http", "errorfile 503", "option httplog", "bind 127.0.0.1:8000", "bind *:", "bind :", "http-request return status 404"])  # fmt: skip
def test_a_line_that_serve_no_longer_writes_is_noticed(tmp_path: Path, line: str) -> None:
    config = render(tmp_path, POOLS)
    kept, found = [], False
    for text in config.splitlines():
        if text.strip().startswith(line) and not found:
            found = True
        else:
            kept.append(text)
    assert found
    with pytest.raises(Unexpected):
        harden("\n".join(kept), Options())


@pytest.mark.parametrize(
    ("host", "bind"),
    [("", "bind 10.0.0.1:8000"), ("0.0.0.0", "bind *:8000"), ("192.168.1.5", "bind 192.168.1.5:8000"), ("::", "bind [::]:8000")],
)  # fmt: skip
def test_the_address_is_ours_to_choose(tmp_path: Path, host: str, bind: str) -> None:
    config = harden(render(tmp_path, POOLS, host="10.0.0.1"), Options(host=host))
    assert f"    {bind}" in section(config, "frontend http_frontend").splitlines()


def test_an_address_cannot_carry_another_directive(tmp_path: Path) -> None:
    with pytest.raises(Unexpected, match="not an address"):
        harden(render(tmp_path, POOLS), Options(host="1.1.1.1:80\n bind *"))


def test_the_access_log_can_be_kept(tmp_path: Path) -> None:
    config = harden(render(tmp_path, POOLS), Options(access_log=True))
    assert "option httplog" in config
    assert "log 127.0.0.1:514 local0 info" in config


def test_grpc_listens_where_http_does(tmp_path: Path) -> None:
    grpc = gRPCOptions(port=9000, grpc_servicer_functions=["a.b"])
    config = harden(render(tmp_path, POOLS, grpc_options=grpc), Options(host="0.0.0.0"))
    assert "    bind *:9000 proto h2" in section(config, "frontend grpc_frontend").splitlines()


def test_grpc_streams_are_not_held_until_their_last_request(tmp_path: Path) -> None:
    grpc = gRPCOptions(port=9000, grpc_servicer_functions=["a.b"])
    streams = backend("twice", REPLAYABLE, [9005])
    streams.name, streams.protocol = "grpc-twice", RequestProtocol.GRPC
    config = harden(render(tmp_path, [*POOLS, streams], grpc_options=grpc), Options())
    assert "http-buffer-request" not in config
    assert "wait-for-body time 8s" in section(config, "backend http-foreign")
    assert "wait-for-body" not in section(config, "backend grpc-twice")


def test_grpc_calls_of_one_request_have_the_time_and_the_second_try_of_their_pool(tmp_path: Path) -> None:
    grpc = gRPCOptions(port=9000, grpc_servicer_functions=["a.b"])
    backends = [
        backend(name, deployment, [port])
        for name, deployment, port in (
            ("foreign", "other", 9005),
            ("twice", REPLAYABLE, 9006),
            ("once", NOT_REPLAYABLE, 9007),
        )
    ]
    for one in backends:
        one.name, one.protocol = f"grpc-{one.app_name}", RequestProtocol.GRPC
    limits = {name: PoolLimits(timeout_s=2.5, drain_s=2.5, max_body_bytes=100) for name in ("foreign", "twice", "once")}
    config = harden(render(tmp_path, [*POOLS, *backends], grpc_options=grpc), Options(limits=limits))
    assert "backend unary-grpc-foreign" not in config
    assert "tcp-ut" not in section(config, "backend grpc-foreign")
    lines = {name: section(config, f"backend unary-grpc-{name}").splitlines() for name in ("twice", "once")}
    for name, found in lines.items():
        assert "    timeout server 3200ms" in found
        assert ("    retries 1" in found) == (name == "twice")
        assert f"track grpc-{name}/SERVE_REPLICA_{name}-" in "".join(found)
        assert "".join(found).endswith(" proto h2 tcp-ut 3s")
        assert section(config, f"backend grpc-{name}").rstrip().endswith(" tcp-ut 3s")
        assert not any("tcp-check" in line or "default-server" in line for line in found)
    rules = section(config, "frontend grpc_frontend").splitlines()
    for name in lines:
        own = rules.index(f"    use_backend grpc-{name} if is_grpc-{name}")
        assert rules[own - 1] == f"    use_backend unary-grpc-{name} if is_unary is_grpc-{name}"
    (paths,) = [rule for rule in rules if rule.startswith("    acl is_unary ")]
    assert "ModelInfer" in paths
    assert "Stream" not in paths
    assert "oad" not in paths, "loads and unloads are the caller's to repeat"


def test_grpc_calls_that_name_no_pool_reach_one_of_ours(tmp_path: Path) -> None:
    grpc = gRPCOptions(port=9000, grpc_servicer_functions=["a.b"])
    backends = []
    for name, deployment, port in (
        ("foreign", "other", 9005),
        ("twice", REPLAYABLE, 9006),
        ("once", NOT_REPLAYABLE, 9007),
    ):
        one = backend(name, deployment, [port])
        one.name, one.protocol = f"grpc-{name}", RequestProtocol.GRPC
        backends.append(one)
    config = harden(render(tmp_path, [*POOLS, *backends], grpc_options=grpc), Options())
    lines = section(config, "frontend grpc_frontend").splitlines()
    assert "    http-request set-header x-maas-unnamed 1 if !{ req.hdr(application) -m found }" in lines
    chosen = lines.index("    use_backend grpc-twice if !{ req.hdr(application) -m found }")
    assert chosen == lines.index("    default_backend default_grpc_backend") - 1, "those who name a pool come first"
    assert "the metadata 'application'" in section(config, "backend default_grpc_backend")
    lone = harden(render(tmp_path, [*POOLS, backends[1]], grpc_options=grpc), Options())
    assert "x-maas-unnamed" not in lone, "Serve's own rule sends everything there"
    path = tmp_path / "grpc.cfg"
    path.write_text(config)
    checked = subprocess.run([find_binary(), "-c", "-f", str(path)], capture_output=True, text=True, timeout=20)
    assert checked.returncode == 0, checked.stderr


def test_before_the_first_application_a_call_gets_a_retry_time(tmp_path: Path) -> None:
    grpc = gRPCOptions(port=9000, grpc_servicer_functions=["a.b"])
    starting = harden(render(tmp_path, [], grpc_options=grpc), Options())
    assert section(starting, "backend default_grpc_backend").count("grpc-status 14") == 2
    assert "status 503" in section(starting, "backend default_backend")
    later = harden(render(tmp_path, POOLS, grpc_options=grpc), Options())
    assert section(later, "backend default_grpc_backend").count("grpc-status 5 ") == 2
    assert "status 404" in section(later, "backend default_backend")


def test_a_back_end_has_the_limits_of_its_pool(tmp_path: Path) -> None:
    limits = {
        "twice": PoolLimits(2.5, 200.0, 1000),
        "once": PoolLimits(30.0, 30.0, 2000),
        "asleep": PoolLimits(5.0, 5.0, 3000),
        "foreign": PoolLimits(1.0, 1.0, 4000),  # left by a pool that had this name
    }
    config = harden(render(tmp_path, POOLS, timeout_server_s=660), Options(limits=limits))
    assert "    timeout server 3200ms" in section(config, "backend http-twice").splitlines()
    assert "    timeout server 30700ms" in section(config, "backend http-once").splitlines()
    for name in ("asleep", "foreign", "likewise"):
        assert "    timeout server" not in section(config, f"backend http-{name}")
    assert "gt 3000" in section(config, "backend http-asleep")
    assert "413" not in section(config, "backend http-foreign")


@pytest.mark.parametrize(
    ("limits", "hard_stop_s"),
    [
        ({"twice": PoolLimits(600.0, 600.0, 1)}, 1210),
        ({"twice": PoolLimits(30.0, 30.0, 1)}, MIN_HARD_STOP_S),
        ({}, 777),  # unknown: the value with which the cluster was started
    ],
)
def test_the_last_requests_of_an_haproxy_have_the_time_that_the_pools_allow(
    tmp_path: Path, limits: dict[str, PoolLimits], hard_stop_s: int
) -> None:
    path = tmp_path / "limits.json"
    write_limits(path, limits)
    config = render(tmp_path, POOLS[:1], hard_stop_after_s=777)
    config = harden(config, Options(limits=read_limits(path)))
    assert f"    hard-stop-after {hard_stop_s}s" in section(config, "global").splitlines()


@dataclass
class Seen:
    """Requests received by the servers, by path."""

    calls: Counter[str] = field(default_factory=Counter)
    headers: dict[str, dict[str, str]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)


class Server(BaseHTTPRequestHandler):
    """A replica that dies once with a request whose path ends in `die`, and is slow for `slow`."""

    protocol_version = "HTTP/1.1"
    seen: ClassVar[Seen] = Seen()

    def do_GET(self) -> None:
        if self.path.endswith("slow"):
            time.sleep(0.5)
        self._answer()

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        path = self.path.partition("?")[0]
        self.seen.digests[self.path] = hashlib.sha256(body).hexdigest()
        self.seen.calls[self.path] += 1
        self.seen.headers[self.path] = {name.lower(): value for name, value in self.headers.items()}
        if path.endswith("die") and self.seen.calls[self.path] == 1:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if path.endswith("slow"):
            time.sleep(1.5)
        if path.endswith("silent"):
            time.sleep(3)
        self._answer()

    def _answer(self) -> None:
        body = b"success" if self.path == "/-/healthz" else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@dataclass
class Front:
    port: int
    pid: int
    directory: Path
    ports: list[int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def raw(self, data: bytes, timeout_s: float = 5.0, ends_sending: bool = False) -> bytes:
        """Returns the response up to the end of the connection or the first pause."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s) as sock:
            sock.sendall(data)
            if ends_sending:
                sock.shutdown(socket.SHUT_WR)
            return _read(sock)


def _read(sock: socket.socket) -> bytes:
    answer = b""
    try:
        while piece := sock.recv(65536):
            answer += piece
            if b'"}' in answer or answer.endswith(b"{}"):
                break
    except TimeoutError:
        pass
    return answer


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """HAProxy as Serve starts it, through the installed launcher; its timeouts are shorter."""
    directory = Path(tmp_path_factory.mktemp("h"))
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), Server) for _ in range(2)]
    threads = [threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}) for server in servers]
    for thread in threads:
        thread.start()
    ports = [server.server_address[1] for server in servers]
    port = unused_port()
    pools = [backend("twice", REPLAYABLE, ports), backend("once", NOT_REPLAYABLE, ports), backend("bulk", REPLAYABLE, ports), backend("used", NOT_REPLAYABLE, ports), backend("gone", REPLAYABLE, [unused_port()])]  # fmt: skip
    text = render(
        directory, pools, port=port, stats_port=unused_port(), metrics_port=unused_port(), maxconn=200,
        timeout_server_s=2, timeout_client_s=1, retries=3,
    )  # fmt: skip
    assert not text.startswith(MARK)
    launcher = find_launcher()
    assert launcher is not None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAAS_RAY_")}
    command = [launcher, "-db", "-f", str(directory / "haproxy.cfg"), "-dR"]
    # Its own time for headers is too long for a test.
    shorter = f"import sys, maas_ray.haproxy as m, maas_ray.haproxy.config.harden as h, maas_ray.haproxy.config.pools as p; h.HEADER_TIMEOUT_S = p.HEADER_TIMEOUT_S = 1; sys.argv = {command!r}; m.main()"
    process = subprocess.Popen([sys.executable, "-c", shorter], env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 20
        while True:
            try:
                requests.get(f"http://127.0.0.1:{port}/-/healthz", timeout=2)
                break
            except requests.ConnectionError:
                assert process.poll() is None, process.stderr and process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.05)
        yield Front(port, process.pid, directory, ports)
    finally:
        process.terminate()
        process.communicate(timeout=20)
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join(20)


def test_the_process_is_the_one_that_serve_started(front: Front) -> None:
    command = Path(f"/proc/{front.pid}/cmdline").read_bytes().split(b"\0")
    assert command[0].endswith(b"/haproxy")
    assert str(front.directory / "haproxy.cfg").encode() in command
    assert Path(f"/proc/{front.pid}/comm").read_text().strip() == "haproxy"
    assert (front.directory / "haproxy.cfg").read_text().startswith(MARK)


def test_other_users_cannot_reach_the_admin_socket_and_the_statistics(front: Front) -> None:
    assert stat.S_IMODE((front.directory / "admin.sock").stat().st_mode) == 0o600
    listening = subprocess.run(["ss", "-ltnpH"], capture_output=True, text=True, check=True).stdout.splitlines()
    ours = [line.split()[3] for line in listening if f"pid={front.pid}," in line]
    assert len(ours) == 3
    assert [address for address in ours if not address.startswith("127.0.0.1:")] == []


def test_a_request_whose_replica_died_is_answered_by_another_one(front: Front) -> None:
    for size in (0, 100, 12_000):
        path = f"/twice/die?{size}"
        answer = requests.post(front.url + path, data=b"1" * size, timeout=10)
        assert (answer.status_code, answer.json(), Server.seen.calls[path]) == (200, {}, 2)


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /twice/x", b"200"),
        (b"GET /twice/slow", b"200"),
        (b"GET /once/slow", b"200"),
        (b"HEAD /used/slow", b"200"),
        (b"GET /gone/x", b"503"),
        (b"GET /-/routes", b"200"),
        (b"GET /nothing", b"404"),
        (b"POST /once/slow", b"400"),  # indistinguishable from a disconnect: unwanted inference is cancelled
    ],
)
def test_a_half_closed_client_gets_the_responses_to_its_reads(front: Front, request_line: bytes, status: bytes) -> None:
    data = b"%b HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n" % request_line
    assert front.raw(data, ends_sending=True).startswith(b"HTTP/1.1 %b " % status)


def test_reads_go_to_the_same_servers_and_in_the_order_of_the_paths(tmp_path: Path) -> None:
    config = harden(
        render(tmp_path, POOLS, timeout_server_s=9), Options(limits={"twice": PoolLimits(2.5, 200.0, 1000)})
    )
    rules = re.findall(r"use_backend (\S+) if", section(config, "frontend http_frontend"))
    for name in ("twice", "once", "foreign", "likewise"):
        assert rules[rules.index(f"http-{name}") - 1] == f"reads-http-{name}"
        twin, given = (section(config, f"backend {prefix}http-{name}") for prefix in ("reads-", ""))
        servers = re.findall(r"server (SERVE\S+) (\S+)", given)
        assert servers
        assert re.findall(r"server (SERVE\S+) (\S+) track (\S+)", twin) == [
            (server, address, f"http-{name}/{server}") for server, address in servers
        ]
        assert "no option abortonclose" in twin
        assert " check" not in twin
    assert "reads-http-asleep" not in rules, "there is no replica to inform"
    assert "    timeout server 3200ms" in section(config, "backend reads-http-twice").splitlines()


def test_a_large_body_goes_through_large_pipes_unchanged(front: Front) -> None:
    body = os.urandom(8 << 20)
    assert requests.post(f"{front.url}/bulk/large", data=body, timeout=20).status_code == 200
    assert Server.seen.digests["/bulk/large"] == hashlib.sha256(body).hexdigest()
    descriptors = list(Path(f"/proc/{front.pid}/fd").iterdir())  # HAProxy keeps the pipe for the next body
    assert PIPE_BYTES in {_pipe_size(path) for path in descriptors if os.readlink(path).startswith("pipe:")}


def _pipe_size(path: Path) -> int:
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        return fcntl.fcntl(number, fcntl.F_GETPIPE_SZ)
    finally:
        os.close(number)


@pytest.mark.parametrize(
    ("path", "size"), [("/once/die?small", 100), ("/twice/die?large", BIG)], ids=["not idempotent", "too large to keep"]
)
def test_a_request_that_must_not_or_cannot_be_repeated_gets_a_typed_refusal(front: Front, path: str, size: int) -> None:
    answer = requests.post(front.url + path, data=b"1" * size, timeout=10)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert answer.headers["content-type"] == "application/json"
    assert "retry if that is safe" in answer.json()["error"]
    assert Server.seen.calls[path] == 1


def test_where_the_connection_to_the_replica_was_used_before_the_refusal_is_a_closed_connection(front: Front) -> None:
    """HAProxy's own behavior, without an option: the client should retry on a new connection (RFC 9112 9.3.1)."""
    for _ in range(4):  # both servers
        assert requests.post(f"{front.url}/used/warm", data=b"1", timeout=10).status_code == 200
    with pytest.raises(requests.ConnectionError, match="without response"):
        requests.post(f"{front.url}/used/die", data=b"1", timeout=10)
    assert Server.seen.calls["/used/die"] == 1


def test_a_pool_without_a_replica_refuses_with_a_type(front: Front) -> None:
    answer = requests.post(f"{front.url}/gone/x", data=b"1", timeout=20)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
    assert "no replica answered" in answer.json()["error"]


def test_a_silent_replica_is_a_timeout_and_is_not_asked_again(front: Front) -> None:
    answer = requests.post(f"{front.url}/twice/silent", data=b"1", timeout=20)
    assert (answer.status_code, answer.json()) == (504, {"error": "the replica did not answer in time"})
    assert Server.seen.calls["/twice/silent"] == 1


def test_a_long_computation_outlives_the_clients_timeout(front: Front) -> None:
    assert requests.post(f"{front.url}/twice/slow", data=b"1", timeout=20).status_code == 200


def test_a_path_of_no_pool_is_answered_in_json(front: Front) -> None:
    answer = requests.get(f"{front.url}/nobody", timeout=10)
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/json")
    assert "no pool is served" in answer.json()["error"]


def test_headers_that_serve_would_obey_do_not_pass(front: Front) -> None:
    sent = {
        "x-request-timeout-seconds": "-1",
        "X-Request-Disconnect-Disabled": "?1",
        "serve_multiplexed_model_id": "m",
        "x-request-id": "mine",
        "x-request-timeout-ms": "100",
    }
    assert requests.post(f"{front.url}/twice/headers", headers=sent, timeout=10).ok
    assert set(Server.seen.headers["/twice/headers"]) & set(map(str.lower, sent)) == {"x-request-id", "x-request-timeout-ms"}  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [b"POST /twice/a HTTP/1.1\r\nHost: a\r\n", b"POST /twice/a HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n1"],
    ids=["headers", "body"],
)
def test_a_slow_sender_is_cut_off_before_it_reaches_a_replica(front: Front, data: bytes) -> None:
    before = sum(Server.seen.calls.values())
    head, _, body = front.raw(data).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    # HAProxy cannot use our error files before it has read the headers.
    assert b"Content-Length" not in data or "did not arrive" in json.loads(body)["error"]
    assert sum(Server.seen.calls.values()) == before


BODY = b"0\r\n\r\nGET /twice/smuggled HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.parametrize(
    "headers",
    [
        b"Content-Length: 4\r\nContent-Length: 5",
        b"Content-Length: 4, 5",
        b"Content-Length: +4",
        b"Content-Length: -1",
        b"Content-Length : 4",
        b"Transfer-Encoding: chunked, identity",
        b"Transfer-Encoding: xchunked",
        b"X: a\x00b",
        b" folded: 1",
    ],
)
def test_a_request_of_two_meanings_is_refused(front: Front, headers: bytes) -> None:
    before = sum(Server.seen.calls.values())
    answer = front.raw(b"POST /twice/a HTTP/1.1\r\nHost: a\r\n" + headers + b"\r\n\r\n" + BODY)
    assert re.match(rb"HTTP/1.1 (400|422|501) ", answer), answer
    assert sum(Server.seen.calls.values()) == before


def test_a_body_with_a_length_and_chunks_reaches_the_replica_with_one_meaning(front: Front) -> None:
    data = b"POST /twice/both HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n"
    front.raw(data + b"3\r\nabc\r\n0\r\n\r\n", timeout_s=1.5)
    headers = Server.seen.headers["/twice/both"]
    assert ("content-length" in headers) != ("transfer-encoding" in headers)


def test_an_unknown_configuration_is_run_unchanged_with_a_warning(tmp_path: Path) -> None:
    """The fault is planted in Serve's file: one line that ours must change has another form."""
    config = render(tmp_path, POOLS, port=unused_port(), stats_port=unused_port(), metrics_port=unused_port(), maxconn=100)  # fmt: skip
    (tmp_path / "haproxy.cfg").write_text(config.replace("bind *:", "bind 127.0.0.2:"))
    launcher = find_launcher()
    assert launcher is not None
    command = [launcher, "-c", "-f", str(tmp_path / "haproxy.cfg")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 0, done.stderr
    assert "is used as Ray Serve wrote it, with open ports: Unexpected" in done.stderr
    assert "bind *:" in (tmp_path / REASON_FILE).read_text()
    assert not (tmp_path / "haproxy.cfg").read_text().startswith(MARK)

    (tmp_path / "haproxy.cfg").write_text(config)
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert not (tmp_path / REASON_FILE).exists()
    assert (tmp_path / "haproxy.cfg").read_text().startswith(MARK)
    assert (tmp_path / "haproxy.cfg.serve").read_text() == config


def test_what_haproxy_refuses_is_not_run(tmp_path: Path) -> None:
    config = render(tmp_path, POOLS)
    host = tmp_path / "host"
    host.write_text("no.such.host.invalid")
    with pytest.raises(Unexpected, match="HAProxy rejects"):
        apply(tmp_path / "haproxy.cfg", find_binary(), {HOST_FILE_VARIABLE: str(host)})
    assert (tmp_path / "haproxy.cfg").read_text() == config


def test_the_launcher_imports_nothing_slow() -> None:
    script = "import sys, maas_ray.haproxy; print(len(sys.modules), {'ray', 'pydantic', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    number, found = done.stdout.split(" ", 1)
    assert found.strip() == "set()"
    assert int(number) < 150


def test_checks_of_many_servers_are_further_apart(tmp_path: Path) -> None:
    def interval_ms(num_servers: int) -> int:
        directory = tmp_path / str(num_servers)
        directory.mkdir(exist_ok=True)
        pools = [backend("many", REPLAYABLE, range(10_000, 10_000 + num_servers))]
        config = harden(render(directory, pools), Options(limits={"many": PoolLimits(30.0, 30.0, 1000)}))
        found = {int(number) for number in re.findall(r"default-server inter (\d+)ms ", config)}
        assert len(found) == 1
        return found.pop()

    assert [interval_ms(number) for number in (1, 250, 350, 500, 2000)] == [500, 500, 700, 1000, 4000]
    for number in (250, 500, 2000):
        assert number / interval_ms(number) * 1000 <= MAX_CHECKS_PER_S


def test_a_silent_server_is_found_among_many_and_nothing_is_read_while_none_is(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["pxname", "svname", "scur", "status", "check_status", "last_chk"]
    up = [["http-many", f"SERVE_REPLICA_many-{REPLAYABLE}-{number}", "3", "UP", "L7OK", ""] for number in range(500)]
    refused = ["http-many", f"SERVE_REPLICA_many-{REPLAYABLE}-a", "3", "DOWN", "L4CON", "Connection refused"]
    hung = ["http-many", f"SERVE_REPLICA_many-{REPLAYABLE}-b", "3", "DOWN", "* L7TOUT", ""]
    twin = ["reads-http-many", hung[1], "2", "DOWN", "", ""]

    def text(*rows: list[str]) -> str:
        return "# " + "\n".join(",".join(row) for row in [names, *rows]) + "\n"

    found = silent.silent(text(*up, refused, hung, twin))
    assert [(server.backend, server.num_requests) for server in found] == [("http-many", 3), ("reads-http-many", 2)]
    assert silent.silent(text(*up, refused)) == []
    monkeypatch.setattr(silent, "read", None)
    assert silent.silent(text(*up)) == silent.silent("") == []
