"""Over gRPC: a call in a replica that was stopped or killed was lost, or hung forever if it had no deadline.

HAProxy as Serve starts it, in front of two servers of grpc.aio.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from ray.serve._private.common import RequestProtocol
from ray.serve.config import gRPCOptions

from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE
from tests.conftest import unused_port
from tests.support.front import Front, backend, until

LIMITS = PoolLimits(timeout_s=6.0, drain_s=6.0, max_body_bytes=1 << 20)
SERVICE = "/inference.GRPCInferenceService"

REPLICA = """
import asyncio, os, sys
import grpc
async def answer(body, context):
    await asyncio.sleep(float(body or b"0"))
    return str(os.getpid()).encode()
async def stream(bodies, context):
    async for body in bodies:
        yield await answer(body, context)
async def healthy(body, context):
    return b"\\x0a\\x07success"
async def main():
    server = grpc.aio.server()
    unary = grpc.unary_unary_rpc_method_handler
    methods = {"ModelInfer": unary(answer), "RepositoryModelLoad": unary(answer)}
    methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(stream)
    server.add_generic_rpc_handlers((
        grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),
        grpc.method_handlers_generic_handler("ray.serve.RayServeAPIService", {"Healthz": unary(healthy)}),
    ))
    server.add_insecure_port(f"127.0.0.1:{sys.argv[1]}")
    await server.start()
    await server.wait_for_termination()
asyncio.run(main())
"""


@dataclass
class GrpcFront:
    """HAProxy, two servers, and a client of it."""

    front: Front
    channel: grpc.Channel
    replicas: list["subprocess.Popen[bytes]"]

    def call(self, body: bytes = b"", method: str = "ModelInfer", timeout_s: float | None = 40) -> int:
        """Returns the pid of the responding server; the servers sleep for the seconds in the body."""
        return int(self.channel.unary_unary(f"{SERVICE}/{method}")(body, timeout=timeout_s))

    def at_once(self, body: bytes, number: int, **options: object) -> list["Future[tuple[int, float]]"]:
        """Answers and the seconds until them, as they come."""

        def timed() -> tuple[int, float]:
            since = time.monotonic()
            return self.call(body, **options), time.monotonic() - since  # type: ignore[arg-type]

        with ThreadPoolExecutor(number) as pool:
            futures = [pool.submit(timed) for _ in range(number)]
            threading.Event().wait(0.3)
            os.kill(self.replicas[0].pid, self.signal)
        return futures

    signal: int = signal.SIGKILL


@pytest.fixture(params=[REPLAYABLE])
def front(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GrpcFront]:
    ports = [unused_port() for _ in range(2)]
    replicas = [subprocess.Popen([sys.executable, "-c", REPLICA, str(port)]) for port in ports]
    front = Front(tmp_path, num_replicas=1, limits=LIMITS, deployment=request.param)
    pool = backend("pool", request.param, ports)
    pool.name, pool.protocol = "grpc-pool", RequestProtocol.GRPC
    front.pools.append(pool)
    front.options["grpc_options"] = gRPCOptions(port=unused_port(), grpc_servicer_functions=["a.b"])
    try:
        front.manager().start()
        with grpc.insecure_channel(f"127.0.0.1:{front.options['grpc_options'].port}") as channel:
            found = GrpcFront(front, channel, replicas)
            until(lambda: answers_twice(found), "both replicas", 40)
            yield found
    finally:
        front.close()
        for replica in replicas:
            replica.kill()
            replica.wait(20)


def answers_twice(front: GrpcFront) -> bool:
    try:
        return len({front.call(timeout_s=5) for _ in range(6)}) == 2
    except grpc.RpcError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=lambda number: number.name)
def test_another_replica_answers_the_calls_of_one_that_is_lost(front: GrpcFront, number: int) -> None:
    front.signal = number
    found = [future.result(60) for future in front.at_once(b"0.8", 6, timeout_s=None)]
    other = front.replicas[1].pid
    assert {pid for pid, _ in found} == {other}
    assert max(seconds for _, seconds in found) < 7  # 3 s until the checks notice, twice its own time, a busy machine
    assert front.call() == other


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "ModelStreamInfer"])
def test_loads_and_streams_are_not_repeated(front: GrpcFront, method: str) -> None:
    if method == "ModelStreamInfer":
        open_ = threading.Event()

        def bodies() -> Iterator[bytes]:
            yield b"0"
            open_.wait(60)

        answers = front.channel.stream_stream(f"{SERVICE}/{method}")(bodies(), timeout=60)
        os.kill(int(next(answers)), signal.SIGKILL)
        with pytest.raises(grpc.RpcError) as caught:
            next(answers)
        open_.set()
        assert caught.value.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)
        return
    codes = []
    for future in front.at_once(b"0.8", 6, method=method):
        try:
            future.result(60)
        except grpc.RpcError as error:
            codes.append(error.code())
    assert codes
    assert set(codes) == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("front", [NOT_REPLAYABLE], indirect=True)
def test_what_must_not_be_repeated_ends_in_the_time_of_its_pool(front: GrpcFront) -> None:
    for replica in front.replicas:
        os.kill(replica.pid, signal.SIGSTOP)
    since = time.monotonic()
    with pytest.raises(grpc.RpcError) as caught:
        front.call(timeout_s=None)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    assert time.monotonic() - since < 9
