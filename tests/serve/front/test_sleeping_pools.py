"""A pool scaled to zero: its responses, and the requests that Serve's proxy accepts for it."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from maas_ray.errors import NotFound
from maas_ray.haproxy.names import REPLAYABLE
from maas_ray.serve.front import proxy_middleware
from maas_ray.serve.front.proxy_middleware import Doorkeeper
from maas_ray.serve.front.sleeping_pools import Asleep
from maas_ray.serve.request.head import Head, find_route
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import app_spec, publish
from tests.support.onnx_models import commit_bundle

Sent = list[dict[str, Any]]


@pytest.fixture
def spec(file_store: ObstoreStore) -> ApplicationSpec:
    publish(file_store, "linear", commit_bundle(file_store))
    sleeps = {"replicas": {"min": 0, "max": 1}, "limits": {"max_body_bytes": 1000, "timeout_s": 5}}
    return app_spec(file_store, "linear", "missing", **sleeps)


@pytest.fixture
def asleep(file_store: ObstoreStore, spec: ApplicationSpec) -> Asleep:
    return Asleep(file_store, spec, "pool")


def get(asleep: Asleep, path: str) -> Any:
    head = Head("GET", path, [])
    head.route = find_route(path)
    return json.loads(asleep.answer(head).body)


def test_the_store_answers_without_a_replica(asleep: Asleep) -> None:
    assert get(asleep, "/v2/health/live") == {"live": True}
    assert get(asleep, "/v2/health/ready") == {"ready": True, "asleep": True}
    assert get(asleep, "/v2")["name"] == "maas-ray"
    assert get(asleep, "/v2/models") == {"models": ["linear", "missing"]}
    metadata = get(asleep, "/v2/models/linear")
    assert (metadata["name"], metadata["versions"]) == ("linear", ["1"])
    assert metadata["inputs"][0]["datatype"] == "FP32"
    assert get(asleep, "/v2/models/linear/versions/1")["versions"] == ["1"]
    assert get(asleep, "/v2/models/linear/ready")["ready"] is True
    assert get(asleep, "/v2/models/linear/config")["max_batch_size"] == 64
    assert get(asleep, "/v2/models/linear/stats") == {"model_stats": []}
    entries = get(asleep, "/v2/repository/index")
    assert [(entry["name"], entry["state"]) for entry in entries] == [("linear", "READY"), ("missing", "UNAVAILABLE")]


def test_the_metrics_of_a_pool_that_sleeps_are_valid(asleep: Asleep) -> None:
    head = Head("GET", "/metrics", [])
    head.route = find_route("/metrics")
    reply = asleep.answer(head)
    assert reply.status == 200
    assert b'maas_replicas_silent{pool="pool"} 0' in reply.body


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/missing", "/v2/models/linear/versions/7"])
def test_what_the_pool_does_not_serve_is_not_found(asleep: Asleep, path: str) -> None:
    with pytest.raises(NotFound):
        get(asleep, path)


class Proxy:
    """Serve's proxy: a table of routes with one pool, and what reached it."""

    def __init__(self, num_replicas: int) -> None:
        replicas = SimpleNamespace(curr_replicas=dict.fromkeys(range(num_replicas)))
        self.handle = SimpleNamespace(_router=SimpleNamespace(_request_router=replicas))
        self.proxy_router = SimpleNamespace(
            match_route=lambda path: ("/pool", self.handle, False) if path.startswith("/pool/") else None,
            route_info={"/pool": self},
            ready_for_traffic=lambda is_head: (self.is_told, ""),
            handles={},
        )
        self.name, self.app_name = REPLAYABLE, "pool"
        self.is_told = True
        self.bodies: list[bytes] = []

    async def __call__(self, scope: Any, receive: Callable[[], Awaitable[Any]], send: Any) -> None:
        self.bodies.append((await receive())["body"] if scope["method"] == "POST" else b"")
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b""})


def ask(
    proxy: Proxy, spec: ApplicationSpec, path: str, pieces: list[bytes] | None = None, **headers: str
) -> tuple[int, bytes, int]:
    """Status, body, and how many pieces were read."""
    sent: Sent = []
    num_read = 0

    async def receive() -> dict[str, Any]:
        nonlocal num_read
        if num_read == len(pieces or []):
            return {"type": "http.disconnect"}
        num_read += 1
        return {"type": "http.request", "body": (pieces or [])[num_read - 1], "more_body": num_read < len(pieces or [])}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def run() -> None:
        raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
        method = "GET" if pieces is None else "POST"
        scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "headers": raw}
        await Doorkeeper(proxy)(scope, receive, send)

    asyncio.run(run())
    return sent[0]["status"], sent[1]["body"], num_read


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, spec: ApplicationSpec) -> ApplicationSpec:
    async def spec_of(identity: Any) -> ApplicationSpec:
        return spec

    monkeypatch.setattr(proxy_middleware, "read_spec", spec_of)
    return spec


INFER = "/pool/v2/models/linear/infer"


@pytest.mark.parametrize(("is_told", "status", "words"), [(True, 404, b"/-/routes"), (False, 503, b"starting")])
def test_a_path_of_no_pool_is_answered_in_json_and_only_once_all_pools_are_known(
    known: ApplicationSpec, is_told: bool, status: int, words: bytes
) -> None:
    proxy = Proxy(0)
    proxy.is_told = is_told
    for pieces in (None, [b"{}"]):
        found, body, num_read = ask(proxy, known, "/elsewhere/v2/models/linear/infer", pieces)
        assert (found, num_read) == (status, 0)
        assert words in json.loads(body)["error"].encode()
    assert proxy.bodies == [], "Serve says 404 in plain text, also before it knows any pool"


@pytest.mark.parametrize("path", ["metrics", "v2/health/ready", "v2/health/live", "v2/models/linear", "v2/models"])
def test_a_look_does_not_wake_a_pool_but_reaches_one_that_is_awake(known: ApplicationSpec, path: str) -> None:
    sleeping, awake = Proxy(0), Proxy(1)
    assert ask(sleeping, known, f"/pool/{path}")[0] == 200
    assert sleeping.bodies == []
    assert ask(awake, known, f"/pool/{path}")[0] == 299


def test_inference_wakes_it_with_the_whole_body(known: ApplicationSpec) -> None:
    proxy = Proxy(0)
    assert ask(proxy, known, INFER, [b"1" * 400, b"2" * 600])[0] == 299
    assert proxy.bodies == [b"1" * 400 + b"2" * 600]


def test_a_body_that_is_too_large_is_refused_before_it_wakes_anything(known: ApplicationSpec) -> None:
    proxy = Proxy(0)
    status, text, num_read = ask(proxy, known, INFER, [b"1" * 300] * 100, content_length="30000")
    assert (status, num_read) == (413, 0)
    status, text, num_read = ask(proxy, known, INFER, [b"1" * 300] * 100)  # in chunks
    assert (status, num_read) == (413, 4)
    assert b"the limit is 1000" in text
    assert proxy.bodies == []


def test_bodies_that_wait_in_the_proxy_have_a_common_bound(
    known: ApplicationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(proxy_middleware, "MAX_BYTES", 999)
    assert ask(Proxy(0), known, INFER, [b"1"])[0] == 503  # in chunks it may have 1000
    assert ask(Proxy(0), known, INFER, [b"1"], content_length="1")[0] == 299


def test_what_leads_nowhere_is_refused_without_a_replica(known: ApplicationSpec) -> None:
    proxy = Proxy(0)
    assert ask(proxy, known, "/pool/v3")[0] == 404
    assert ask(proxy, known, INFER)[0] == 405
    assert proxy.bodies == []


def test_other_applications_are_left_alone(known: ApplicationSpec) -> None:
    proxy = Proxy(0)
    assert ask(proxy, known, "/-/routes")[0] == 299
    proxy.name = "somebody-else"
    assert ask(proxy, known, "/pool/v2/health/ready")[0] == 299
