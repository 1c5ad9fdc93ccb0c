"""Replica without Ray: registry and bundles in a directory, the ASGI app behind uvicorn on a real socket."""

import asyncio
import functools
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest
import uvicorn
import uvloop

from maas_ray.registry.models import Registry
from maas_ray.serve.http.asgi_app import App
from maas_ray.serve.http.protocol import HttpProtocol
from maas_ray.serve.http.server_state import HttpServerState
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.handler import Handler
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.store.objects import ObstoreStore, open_store
from tests.support.onnx_models import LOOKUP, MIXED, commit_bundle, linear, lookup, mixed

T = TypeVar("T")


def app_spec(store: ObstoreStore, *models: str, **more: Any) -> ApplicationSpec:
    described = {
        "storage": {"uri": store.uri},
        "models": [{"name": name} for name in models],
        "refresh": {"poll_interval_s": 0.05},
        **more,
    }
    return ApplicationSpec.model_validate(described)


def publish(store: ObstoreStore, name: str, bundle: str) -> int:
    """Publishes and promotes."""
    registry = Registry(store)
    version = registry.publish(name, bundle)
    registry.promote(name, version.version)
    return version.version


@dataclass
class Server:
    """A running server; `call` runs a coroutine on its loop."""

    url: str
    port: int
    store: ObstoreStore
    manager: ModelManager
    loop: asyncio.AbstractEventLoop
    front: HttpServerState
    """What the connections of our protocol class share."""

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)

    def call_plain(self, work: Callable[[], T]) -> T:
        async def run() -> T:
            return work()

        return self.call(run())


def serve_app(store: ObstoreStore, spec: ApplicationSpec, front: str = "plain") -> Iterator[Server]:
    """With the front `protocol` our protocol class is before the app, as in a replica; else uvicorn's own."""
    manager = ModelManager(store, spec)
    handler = Handler(manager)
    shared = HttpServerState(handler, spec.limits)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    http: Any = functools.partial(HttpProtocol, shared=shared) if front == "protocol" else "auto"
    config = uvicorn.Config(App(handler, spec.limits), http=http, log_level="warning", log_config=None)
    server = uvicorn.Server(config)
    loops: list[asyncio.AbstractEventLoop] = []
    started = threading.Event()

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        serving = asyncio.ensure_future(server.serve([listening]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.01)
        started.set()
        await serving

    def run() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as in Ray's workers
            runner.run(main())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert started.wait(60)
    assert server.started, "the server did not start"
    try:
        yield Server(f"http://127.0.0.1:{port}", port, store, manager, loops[0], shared)
    finally:
        server.should_exit = True
        thread.join(60)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"


@pytest.fixture
def server(file_store: ObstoreStore) -> Iterator[Server]:
    """Serves `linear` (y = 2x), for tests that change something."""
    publish(file_store, "linear", commit_bundle(file_store, linear(2.0), run="run-a"))
    yield from serve_app(file_store, app_spec(file_store, "linear", limits={"max_body_bytes": 100_000}), "protocol")


@pytest.fixture(scope="module", params=["protocol", "plain"])
def shared_server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Server]:
    """Serves `linear`, `mixed` and `lookup`, for read-only tests; both fronts must send the same responses."""
    path: Path = tmp_path_factory.mktemp("serve")
    store = open_store(f"file://{path}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0), run="run-a"))
    publish(store, "mixed", commit_bundle(store, mixed(), MIXED, run="run-b"))
    publish(store, "lookup", commit_bundle(store, lookup(), LOOKUP, run="run-c"))
    yield from serve_app(
        store,
        app_spec(store, "linear", "mixed", "lookup", limits={"max_body_bytes": 100_000, "timeout_s": 20}),
        request.param,
    )
