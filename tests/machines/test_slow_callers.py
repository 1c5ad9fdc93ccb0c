"""The portable profile on several machines gives up callers that send half a head or half a body."""

import socket
import time
from collections.abc import Iterator

import pytest

from tests.support.hosts import Host, Network, ray_cluster
from tests.support.hosts.served import INFER, PORT, publish, serve, statuses, write_spec

PORTABLE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "0",
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "0",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "maas_ray.serve.replica.server_hook:before_proxy",
}
PATIENCE_S = 30.0
HALF_A_HEAD = f"POST {INFER} HTTP/1.1\r\nhost: a\r\n".encode()
HALF_A_BODY = HALF_A_HEAD + b"content-type: application/json\r\ncontent-length: 1000\r\n\r\n{"


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    with Network(2) as found:
        publish(found)
        ray_cluster.start(found, num_cpus=2, env=PORTABLE)
        serve(found, write_spec(found, profile="portable"))
        yield found


@pytest.mark.parametrize("sent", [HALF_A_HEAD, HALF_A_BODY], ids=["head", "body"])
def test_half_a_request_is_given_up(network: Network, sent: bytes):
    for host in network.hosts:
        assert held_s(host, sent) < PATIENCE_S
    assert statuses(network.hosts) == [200, 200]


def held_s(host: Host, sent: bytes) -> float:
    """How long a connection stays open that sends no more; `PATIENCE_S` where that is longer."""
    began_s = time.monotonic()
    with socket.create_connection((host.address, PORT), timeout=PATIENCE_S) as sock:
        sock.sendall(sent)
        try:
            while sock.recv(1 << 16):
                pass
        except TimeoutError:
            return PATIENCE_S
        except ConnectionResetError:
            pass
    return time.monotonic() - began_s
