"""What the nemesis of several hosts counts is there when it is planted: stand-ins for fronts, which are right or are not."""

import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.machines.test_nemesis import LOG, POOL, verdict_of
from tests.support.balancer import Balancer
from tests.support.hosts import Network
from tests.support.hosts.served import PORT
from tests.support.hosts.struck import Event, Struck, wait_until
from tests.support.ledger import Call
from tests.support.open_loop import OpenLoopCallers, longest_window_s
from tests.support.patient import longest_silence_s

CUT_S = 5.0
# Answers as the front of a pool with y = 2 x does, and writes each request down. LOG, the factor and the number of records.
FRONT = """
import json, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
log, factor, num_records = open(sys.argv[1], "a", buffering=1), float(sys.argv[2]), int(sys.argv[3])
class Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        self.answer({})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        values = [factor * value for value in asked["inputs"][0]["data"]]
        for number in range(num_records):
            log.write(json.dumps({"request_id": asked["id"], "status": 200, "replica": str(number)}) + "\\n")
        self.answer({"id": asked["id"], "outputs": [{"data": values}]})
    def answer(self, document):
        body = json.dumps(document).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.send_header("x-maas-version", "1")
        self.send_header("x-request-id", self.headers.get("x-request-id", ""))
        self.end_headers()
        self.wfile.write(body)
    def log_message(self, *arguments):
        pass
ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("0.0.0.0", int(sys.argv[4])), Front).serve_forever()
"""


@contextmanager
def fronts(factor: float = 2.0, num_records: int = 1) -> Iterator[Network]:
    """Two hosts, of which the second one has a fault."""
    with Network(2) as network:
        (network.shared / "front.py").write_text(FRONT)
        programs = [
            host.start(f"{sys.executable} {network.shared}/front.py /home/maas/{LOG} {x:g} {num} {PORT}", "front.log")
            for host, x, num in zip(network.hosts, (2.0, factor), (1, num_records), strict=True)
        ]
        yield network
        for host, program in zip(network.hosts, programs, strict=True):
            host.lose()
            program.wait(20)


@contextmanager
def asked(network: Network, *, asks: bool = True) -> Iterator[tuple[Struck, OpenLoopCallers]]:
    addresses = [host.address for host in network.hosts]
    with Balancer(addresses, PORT, asks=False) as everywhere, Balancer(addresses, PORT) as balancer:
        wait_until(lambda: len(balancer.healthy) == 2, "answer of both fronts", 60)
        used = balancer if asks else everywhere
        with OpenLoopCallers(used, PORT, f"/{POOL}/x", (0.5, 2.0), name="call") as callers:
            callers.wait(60)
            yield Struck(network, POOL, used, random.Random(1)), callers
            callers.wait(60)


def test_a_run_without_a_fault_has_none():
    with fronts() as network:
        with asked(network) as (struck, callers):
            pass
        assert verdict_of(struck, "call", 0, callers.calls).faults == {}


@pytest.mark.parametrize(
    ("factor", "num_records", "fault"), [(3.0, 1, "wrong"), (2.0, 2, "duplicated"), (2.0, 0, "unrecorded")]
)
def test_a_front_with_a_fault_is_seen(factor: float, num_records: int, fault: str):
    """It answers as another version does, runs each request twice, or answers what no replica has run."""
    with fronts(factor, num_records) as network:
        with asked(network) as (struck, callers):
            pass
        faults = verdict_of(struck, "call", 0, callers.calls).faults
        assert set(faults) == {fault}
        assert len(faults[fault]) > 20


def test_a_time_without_any_front_is_a_window():
    with fronts() as network, asked(network) as (_, callers):
        began_s = time.monotonic()
        for host in network.hosts:
            host.cut()
        time.sleep(CUT_S)
        for host in network.hosts:
            host.mend()
        wait_until(lambda: callers.calls[-1].status == 200 and callers.calls[-1].ended_s > began_s + CUT_S, "answer", 30)  # fmt: skip
        calls, ended_s = list(callers.calls), time.monotonic()
        assert longest_silence_s(calls, began_s, ended_s) > CUT_S - 0.5
        assert longest_window_s(calls, network.hosts[0].address, began_s, ended_s) > CUT_S - 0.5


@pytest.mark.parametrize("asks", [True, False])
def test_a_load_balancer_that_asks_for_health_leaves_out_the_node_that_was_cut_off(asks: bool):
    """The planted fault is one that does not ask: its callers meet the dead node as long as that is away."""
    with fronts() as network, asked(network, asks=asks) as (_, callers):
        other, cut = network.hosts
        event = Event("partition", cut.name, cut.address, "", time.monotonic())
        cut.cut()
        time.sleep(CUT_S)
        event.end_s = time.monotonic()
        cut.mend()
        calls = [call for call in list(callers.calls) if event.start_s < call.sent_s]
        assert longest_window_s(calls, other.address, event.start_s, event.end_s) < 2.0
        late = [call for call in calls if met_the_dead(call) and call.sent_s > event.start_s + 3.0]
        assert (late == []) is asks


def met_the_dead(call: Call) -> bool:
    return len(call.attempts) > 1
