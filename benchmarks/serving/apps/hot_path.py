"""The hot path alone: bytes of requests into the protocol class, bytes of answers out of it, in one process without sockets.

Arguments: ONNX file, file with the body of a request, empty directory. Reads lines `VARIANT CLIENTS REQUESTS` and writes,
for each, the CPU time of one request in microseconds. Runs in the environment of any commit: uses what `direct_app` uses.
"""

import asyncio
import gc
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import uvicorn
import uvloop
from uvicorn.server import ServerState

MODEL = "bench"
PATH = f"/v2/models/{MODEL}/infer"


class Transport(asyncio.Transport):
    """Counts answers."""

    def __init__(self, side):
        super().__init__()
        self.side = side

    def write(self, data):
        self.side.answered(data)

    def writelines(self, parts):
        self.side.answered(b"".join(parts))

    def is_closing(self):
        return False

    def get_write_buffer_size(self):
        return 0

    def get_extra_info(self, name, default=None):
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def pause_reading(self):
        pass

    resume_reading = close = abort = pause_reading


class Side:
    """One kind of protocol class with connections to it."""

    def __init__(self, make):
        self.make = make
        self.connections = []
        self.done = None
        self.waiting = 0
        self.first = b""

    def answered(self, data):
        self.first = self.first or data
        self.waiting -= 1
        if not self.waiting:
            self.done.set_result(None)

    async def run(self, clients, requests, heads, body):
        """So many requests, from each client one in each turn of the loop; returns CPU seconds."""
        while len(self.connections) < clients:
            protocol = self.make()
            protocol.connection_made(Transport(self))
            self.connections.append(protocol)
        connections, loop = self.connections[:clients], asyncio.get_running_loop()
        turns = max(1, requests // clients)
        sent = [next(heads) + body for _ in range(turns * clients)]
        used = time.process_time()
        for turn in range(turns):
            self.done, self.waiting = loop.create_future(), clients
            for protocol, data in zip(connections, sent[turn * clients :], strict=False):
                if hasattr(protocol, "get_buffer"):
                    protocol.get_buffer(-1)[: len(data)] = data
                    protocol.buffer_updated(len(data))
                else:
                    protocol.data_received(data)
            await self.done
        return (time.process_time() - used) / (turns * clients)


async def ours(model, directory, observers=(), **more):
    from maas_ray.registry.importing import import_onnx
    from maas_ray.registry.models import PRODUCTION, Registry
    from maas_ray.serve.http.asgi_app import App
    from maas_ray.serve.http.protocol import HttpProtocol
    from maas_ray.serve.http.server_state import HttpServerState
    from maas_ray.serve.models.manager import ModelManager
    from maas_ray.serve.request.handler import Handler
    from maas_ray.serve.spec.pools import ApplicationSpec
    from maas_ray.store.objects import open_store

    store = open_store(str(directory / "store"))
    registry = Registry(store)
    registry.promote(MODEL, registry.publish(MODEL, import_onnx(store, model).bundle_id).version, PRODUCTION)
    described = {
        "storage": {"uri": store.uri},
        "models": [{"name": MODEL}],
        "refresh": {"poll_interval_s": 60.0},
        **more,
    }
    spec = ApplicationSpec.model_validate(described)
    handler = Handler(ModelManager(store, spec), observers=observers)
    await handler.manager.start()
    front, config = (
        HttpServerState(handler, spec.limits),
        uvicorn.Config(App(handler, spec.limits), log_level="warning"),
    )
    config.load()
    state = ServerState()
    return Side(lambda: HttpProtocol(config, state, {}, shared=front))


def bare(model):
    """The class of sketch_app.py, which owes nothing to anybody."""
    os.environ |= {"BENCH_MODEL": model, "BENCH_PATH": PATH}
    import sketch_app

    config = uvicorn.Config(sketch_app.app, log_level="warning", ws="none", lifespan="off")
    config.load()
    state = ServerState()
    return Side(lambda: sketch_app.Protocol(config, state, {}))


def heads(size, *lines):
    """Heads without end, with a number in each where `%d` is."""
    text = "\r\n".join([f"POST {PATH} HTTP/1.1", "host: a", *lines, f"content-length: {size}", "", ""])
    number = 0
    while True:
        number += 1
        yield (text % number if "%d" in text else text).encode()


# Plain functions: a mock's own call would cost more than what it replaces.
def one_id():
    return b"0" * 32


def nothing(self, *values):
    pass


def without_ids():
    return [mock.patch("maas_ray.serve.http.protocol.new_request_id", one_id)]


def without_counts():
    stats = "maas_ray.serve.telemetry.stats.ModelStats"
    return [mock.patch(f"{stats}.{name}", nothing) for name in ("waited", "ran", "served")]


async def logged(model, directory):
    from maas_ray.serve.telemetry.access_log import AccessLogSpec, open_access_log

    log = open_access_log(AccessLogSpec(enabled=True, path=str(directory / "access.jsonl")), "r")
    return await ours(model, directory / "logged", [log])


async def main():
    model, body_path, directory = sys.argv[1:]
    body, directory = Path(body_path).read_bytes(), Path(directory)
    plain = await ours(model, directory / "plain")
    known, deadline = heads(len(body)), heads(len(body), "x-request-timeout-ms: 20000")
    named = heads(len(body), "x-request-id: call-%d")
    # Made when it is asked for first: another commit need not have every setting.
    makers = {
        "bare": lambda: bare(model),
        "access-log": lambda: logged(model, directory),
        "no-checks": lambda: ours(model, directory / "unchecked", batching={"check_share": 0.0}),
    }
    asked = {"deadline": deadline, "callers-id": named}
    patched = {"no-ids": without_ids, "no-counts": without_counts}
    sides = {}
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)  # as a replica does
    print("ready", flush=True)
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    while line := await reader.readline():
        name, clients, requests = line.decode().split()
        if name not in sides:
            made = makers[name]() if name in makers else plain
            sides[name] = await made if asyncio.iscoroutine(made) else made
        side = sides[name]
        with ExitStack() as stack:
            for patch in patched.get(name, list)():
                stack.enter_context(patch)
            side.first = b""
            used_s = await side.run(int(clients), int(requests), asked.get(name, known), body)
        assert side.first.startswith(b"HTTP/1.1 200 "), side.first
        print(1e6 * used_s, flush=True)


if __name__ == "__main__":
    uvloop.run(main())
