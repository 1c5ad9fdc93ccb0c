"""With HTTP_PROXY set no command found its own cluster, and an IPv6 address broke every URL."""

import json
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import AF_INET6
from typing import Any
from urllib.request import urlopen

import pytest
import requests

from maas_ray.addresses import exempt_from_proxies, http_url, is_loopback, reachable_host
from maas_ray.client import Client
from maas_ray.cluster.dashboard import Dashboard
from maas_ray.cluster.health.front import front_url
from maas_ray.cluster.members.local_node import write_exports
from maas_ray.cluster.node.state import ClusterState
from maas_ray.errors import SpecError
from maas_ray.haproxy import HOST_FILE_VARIABLE
from maas_ray.serve.spec.serve import HttpSpec
from maas_ray.spec import parse_spec

DEAD_PROXY = "http://127.0.0.1:9"


class Cluster(BaseHTTPRequestHandler):
    """A dashboard and a model."""

    http_options: dict[str, Any] | None = None

    def do_GET(self) -> None:
        tensor = {"name": "x", "datatype": "FP32", "shape": [-1, 1]}
        answers = {
            "/api/serve/applications/": {"applications": {}, "http_options": self.http_options},
            "/api/version": {"ray_version": "1"},
            "/v2/models/m": {"name": "m", "inputs": [tensor], "outputs": [tensor]},
        }
        body = json.dumps(answers[self.path]).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


class Ipv6Server(ThreadingHTTPServer):
    address_family = AF_INET6


@pytest.fixture(params=["127.0.0.1", "::1"])
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    kind = Ipv6Server if ":" in request.param else ThreadingHTTPServer
    with kind((request.param, 0), Cluster) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield http_url(request.param, server.server_address[1])
        server.shutdown()
        thread.join(10)


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, DEAD_PROXY)


@pytest.mark.usefixtures("proxied")
def test_the_clusters_own_addresses_are_reached_without_the_proxy(url: str) -> None:
    with pytest.raises(requests.exceptions.ProxyError):  # the planted proxy does intercept other clients
        requests.get(f"{url}/api/version", timeout=5)
    assert Dashboard(url, None).version(timeout_s=5) == "1"
    assert Client(url, timeout_s=5).inputs("m")[0].name == "x"


@pytest.mark.usefixtures("proxied")
def test_every_client_of_the_process_leaves_the_proxy_out_once_loopback_is_exempt(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = {"NO_PROXY": "example.org, 10.0.0.1"}
    exempt_from_proxies(environ, ["10.1.2.3"])
    exempt_from_proxies(environ, ["10.1.2.3"])
    assert environ["no_proxy"] == environ["NO_PROXY"] == "example.org,10.0.0.1,127.0.0.1,localhost,::1,10.1.2.3"
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert requests.get(f"{url}/api/version", timeout=5).ok
    if "[" not in url:  # urllib does not support bracketed addresses as exceptions
        with urlopen(f"{url}/api/version", timeout=5) as answer:
            assert answer.status == 200


def state(directory: Path, dashboard_url: str) -> ClusterState:
    (directory / "token").write_text("t")
    return ClusterState(
        cluster_id="c",
        profile="fast",
        address="127.0.0.1:1",
        dashboard_url=dashboard_url,
        http_port=8000,
        token_path=str(directory / "token"),
        temp_dir=str(directory),
        started_s=0.0,
        environment={HOST_FILE_VARIABLE: str(directory / "host")},
    )


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        (None, "http://127.0.0.1:8123"),
        ("::1", "http://[::1]:8123"),
        ("::", "http://[::1]:8123"),
        ("0.0.0.0", "http://127.0.0.1:8123"),
        ("192.168.1.5", "http://192.168.1.5:8123"),
    ],
)
def test_the_address_that_was_configured_is_the_one_that_is_shown(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, host: str | None, expected: str
) -> None:
    monkeypatch.setattr(Cluster, "http_options", {"host": "127.0.0.1", "port": 8123})
    if host is not None:
        (tmp_path / "host").write_text(f"{host}\n")
    assert front_url(state(tmp_path, url)) == expected


def test_without_an_answer_of_the_dashboard_the_usual_address_is_shown(tmp_path: Path, url: str) -> None:
    assert front_url(state(tmp_path, url)) == "http://127.0.0.1:8000"  # Serve does not run
    assert front_url(state(tmp_path, DEAD_PROXY)) == "http://127.0.0.1:8000"


def test_the_terminals_exceptions_are_kept_by_the_clusters_script(tmp_path: Path) -> None:
    write_exports(tmp_path, state(tmp_path, DEAD_PROXY))
    script = tmp_path / "env.sh"
    for given, expected in (({}, "127.0.0.1,localhost,::1"), ({"NO_PROXY": "a.b"}, "a.b,127.0.0.1,localhost,::1")):
        command = ["bash", "-c", f". {script}; echo $NO_PROXY"]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=20, check=True)
        assert done.stdout.strip() == expected


@pytest.mark.parametrize(
    ("given", "host"), [("::1", "::1"), ("[::1]", "::1"), ("0.0.0.0", "0.0.0.0"), ("a.example", "a.example")]
)
def test_an_address_is_taken_with_or_without_brackets(given: str, host: str) -> None:
    assert parse_spec(HttpSpec, {"host": given}).host == host


@pytest.mark.parametrize("given", ["", "1.1.1.1:80\n bind *", "http://a", "a b", "-a"])
def test_an_invalid_address_is_refused_before_anything_starts(given: str) -> None:
    with pytest.raises(SpecError, match="is not an address or a host name"):
        parse_spec(HttpSpec, {"host": given})


def test_loopback_has_many_names() -> None:
    loopback = ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1", "[::1]", "LOCALHOST.")
    assert all(map(is_loopback, loopback))
    assert not any(map(is_loopback, ("", "example.org", "10.0.0.1", "::", "0.0.0.0", "localhost.example.org")))
    assert reachable_host("::") == "::1"
