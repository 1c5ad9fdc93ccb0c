"""`/v2%2frepository/index`, `/v2/models/linear%2finfer`, `//v2/…` and trailing slashes were answered 200, which
bypassed a path filter of a proxy. A path that is not exactly a route gets 404, in every front, below a base path too.
"""

import json
import random
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

import grpc
import httptools
import pytest

from maas_ray.errors import BadRequest, NotFound
from maas_ray.serve.http.asgi_app import App
from maas_ray.serve.http.raw_head import parse_head
from maas_ray.serve.request.head import Route, find_route
from maas_ray.serve.request.url_path import below, sent_path
from maas_ray.store.objects import open_store
from tests.attacks.raw import Talk
from tests.conftest import RayCluster
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, linear

ROUTES = [
    "/v2", "/v2/health/live", "/v2/health/ready", "/metrics", "/v2/models", "/v2/models/stats", "/v2/repository/index",
    "/v2/repository/models/linear/load", "/v2/repository/models/linear/unload", "/v2/models/linear",
    "/v2/models/linear/ready", "/v2/models/linear/config", "/v2/models/linear/stats", "/v2/models/linear/infer",
    "/v2/models/linear/versions", "/v2/models/linear/versions/1", "/v2/models/linear/versions/1/ready",
    "/v2/models/linear/versions/1/config", "/v2/models/linear/versions/1/stats", "/v2/models/linear/versions/1/infer",
]  # fmt: skip
NO_ROUTES = [
    "/v2%2frepository/index", "/v2%2Frepository%2Findex", "%2fv2/repository/index", "/%2fv2/repository/index",
    "/v2/models/linear%2finfer", "/v2/models%2flinear/infer", "/v2/models/linear/versions%2f1/infer",
    "/v2/models/linear/versions/1%2finfer", "/v2/models/linear%2Fversions%2F1%2Finfer", "/v2/models/linear%5cinfer",
    "//v2/repository/index", "///v2/models", "/v2//repository/index", "/v2/repository//index", "/v2/models//infer",
    "/v2/", "/v2/models/", "/v2/models/linear/", "/v2/models/linear/infer/", "/v2/models/linear/infer//", "/metrics/",
    "/v2/./repository/index", "/v2/x/../repository/index", "/./v2/models", "/v2/models/linear/../linear/infer",
    "/v2/models/linear/infer/.", "/v2/models/%2e%2e/repository/index", "/v2/models/%2e/linear", "/v2/models/.%2e/index",
    "/v2/models/linear%00", "/v2/models/linear/infer%00", "/v2%00/models", "/v2/models/linear%0a", "/v2/models/%7f",
    "/v2/models/%c0%afetc", "/v2/models/linear%c0%afinfer", "/v2/models/%ff", "/v2/models/%e0%80%af", "/v2/models/%ed%a0%80",
    "/v2/models/linear%", "/v2/models/linear%2", "/v2/models/%zz", "/v2/models/linear%252finfer", "/v2%252fmodels",
    "/v2;a=b/models", "/v2/models;a/linear", "/v2/models/linear;v=1/infer", "/v2/models/linear/infer;jsessionid=1",
    "/v2/%6dodels", "/%762/models", "/v2/%72epository/index", "/v2/models/linear/%69nfer", "/v2/models/%73tats/x",
    "/V2/models", "/v2/Models/linear", "/v2/models/linear/INFER", "/v2/models/linear/versions/%31/infer",
    "/v2/models/linear/versions/../infer", "/v2/models/linear/versions/1;a/infer", "/v2 /models", "/v2/models\t",
    "\\v2\\models", "/v2\\models", "/v2/models/lin\\ear/infer", "", "/", "/.", "/..", "/v2/health", "/v1", "/v2/models/a/b/c/d/e/f/g",
]  # fmt: skip


def reference(path: str) -> list[tuple[str, str]]:
    """The segments of a path as sent and decoded, by the words of RFC 3986: split first, decode then."""
    if not path.startswith("/") or re.search(r"%(?![0-9A-Fa-f]{2})", path):
        return []
    return [(segment, unquote(segment, errors="surrogateescape")) for segment in path[1:].split("/")]


def expected(path: str) -> Route | None:
    """The route that a path is, word by word; only where `linear` is written its letters may be encoded."""
    segments = reference(path)
    for route in ROUTES:
        words = route[1:].split("/")
        if len(words) != len(segments):
            continue
        names = [plain for word, (_, plain) in zip(words, segments, strict=True) if word == "linear"]
        if any(sent != word for word, (sent, _) in zip(words, segments, strict=True) if word != "linear"):
            continue
        if not all(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name) for name in names):
            continue
        whats = {"/v2": "server", "/v2/models/linear": "model", "/v2/models/linear/versions/1": "model"}
        ending = "model_ready" if names and route.endswith("ready") else words[-1]
        what = whats.get(route, ending)
        method = "POST" if what in ("infer", "load", "unload", "index") else "GET"
        return Route(what, method, *names, version=1 if "versions/1" in route else None)
    return None


def by_route(path: str) -> Route | None:
    try:
        return find_route(path)
    except (NotFound, BadRequest):
        return None


def by_protocol_class(target: str, base: str = "") -> Route | None:
    """The route of a target by the fast path; None: the slow path decides, or there is no route."""
    head = parse_head(f"POST {target} HTTP/1.1\r\nhost: a\r\n\r\n".encode("latin-1"), base)
    return None if head is None else by_route(head.path)


def by_asgi(target: str, base: str = "") -> Route | None:
    """Path that the app derives from uvicorn's scope of a target."""
    try:
        raw_path = httptools.parse_url(target.encode("latin-1")).path or b""
    except httptools.HttpParserInvalidURLError:
        return None
    return by_route(below(base, sent_path(raw_path, unquote(raw_path.decode("latin-1")))))


def encodings(route: str, random_: random.Random) -> Iterator[str]:
    """Spellings that some server might decode to a route."""
    for _ in range(300):
        target = ""
        for sign in route:
            choice = random_.random()
            if choice < 0.08:
                sign = random_.choice([f"%{ord(sign):02x}", f"%{ord(sign):02X}"])
            elif choice < 0.10:
                sign += random_.choice(
                    ["/", "%2f", "/.", "/..", "%00", ";a=b", "\\", "%5c", "%c0%af", "%", "//", "%25"]
                )
            target += sign
        yield target


@pytest.mark.parametrize("base", ["", "/pools/a"])
@pytest.mark.parametrize("route", ROUTES)
def test_every_way_in_sees_the_same_route(route: str, base: str) -> None:
    random_ = random.Random(f"{route} {base}")
    num_found = 0
    for path in [route, *encodings(route, random_)]:
        wanted = expected(path)
        num_found += wanted is not None
        assert (by_protocol_class(base + path, base), by_asgi(base + path, base)) == (wanted, wanted), path
    assert num_found, "the route itself is one"


@pytest.mark.parametrize("path", NO_ROUTES)
def test_a_path_that_is_not_exactly_a_route_is_not_found(path: str) -> None:
    with pytest.raises(NotFound):
        find_route(path)
    for base in ("", "/pools/a"):
        assert by_protocol_class(base + path, base) is None
        assert by_asgi(base + path, base) is None


@pytest.mark.parametrize("name", ["linear", "lin%65ar", "l%69n%65ar", "%6C%69near"])
def test_the_name_of_a_model_may_be_encoded(name: str) -> None:
    assert by_route(f"/v2/models/{name}/infer") == Route("infer", "POST", "linear")


@pytest.mark.parametrize(
    "target",
    [
        "/v2/models", "/pools%2fa/v2/models", "/%70ools/a/v2/models", "/pools//a/v2/models", "//pools/a/v2/models",
        "/pools/a/../a/v2/models", "/pools/./a/v2/models", "/pools/a%2fv2/models", "/pools/ab/v2/models", "/pools/a",
        "/pools/a/", "/pools/a//v2/models", "/pools/a;b/v2/models", "/POOLS/a/v2/models", "/x/../pools/a/v2/models",
        "/pools/a%00/v2/models",
    ],
)  # fmt: skip
def test_a_base_path_is_compared_as_it_was_sent(target: str) -> None:
    """As HAProxy does (path_beg): both must parse a path in the same way."""
    assert by_protocol_class(target, "/pools/a") is None
    assert by_asgi(target, "/pools/a") is None


def test_an_absolute_target_leads_where_its_path_does() -> None:
    assert by_protocol_class("http://a/v2/models/linear/infer") == by_asgi("http://a/v2/models/linear/infer") != None  # noqa: E711
    for target in ("http://a//v2/models", "http://a/v2%2fmodels", "http://a", "http://a?/v2/models", "http:/v2/models"):
        assert by_protocol_class(target) is by_asgi(target) is None


def test_a_path_of_a_server_without_raw_paths_is_decoded_once() -> None:
    assert find_route(sent_path(None, "/v2/models/linear/infer")).name == "infer"
    with pytest.raises(NotFound):
        find_route(sent_path(None, "/v2/models/lin%65ar/infer"))


@pytest.fixture(scope="module", params=["protocol", "plain"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('paths')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    yield from serve_app(store, app_spec(store, "linear"), request.param)


def statuses(port: int, method: str, target: str, body: bytes = b"{}") -> int:
    head = f"{method} {target} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode("latin-1")
    with Talk(port) as talk:
        talk.send([head + body])
        answer = talk.read()
    assert answer is not None
    if answer.status == 404:
        assert set(json.loads(answer.body)) == {"error"}
    return answer.status


def is_a_line(path: str) -> bool:
    """Whether a request line can contain the path at all: otherwise it is refused before it is parsed (400)."""
    return re.fullmatch(r"/[!-~]*", path) is not None


@pytest.mark.parametrize("path", [path for path in NO_ROUTES if is_a_line(path)])
def test_over_a_socket_it_is_404(server: Server, path: str) -> None:
    for method in ("GET", "POST"):
        assert statuses(server.port, method, path) == 404


def test_over_a_socket_the_routes_are_there(server: Server) -> None:
    for path in ROUTES:
        assert statuses(server.port, "GET", path) in (200, 405), path
        assert statuses(server.port, "GET", f"http://a{path}") in (200, 405), path


def test_an_app_with_a_base_path_answers_only_paths_below_it(server: Server) -> None:
    """The scope of a server that mounts the app, as Serve's does: `path` and `raw_path` include `root_path`."""
    app = App(_handler(server), app_spec(server.store, "linear").limits)

    async def status(raw_path: str) -> int:
        sent: list[dict[str, Any]] = []
        scope = {
            "type": "http", "method": "GET", "headers": [], "root_path": "/pools/a",
            "path": unquote(raw_path), "raw_path": raw_path.encode(),
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert server.call(status("/pools/a/v2/models")) == 200
    for path in ("/v2/models", "/pools%2fa/v2/models", "/pools/a%2fv2/models", "/pools/ab/v2/models", "/pools/a"):
        assert server.call(status(path)) == 404, path


def _handler(server: Server) -> Any:
    return server.front.handler


@pytest.mark.fault
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20", "ignore::ResourceWarning")
def test_behind_haproxy_two_pools_see_only_their_own_paths(
    ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from maas_ray.serve.deploy import pool
    from maas_ray.serve.spec.serve import ServeSpec

    store = open_store(f"file://{tmp_path_factory.mktemp('pools')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    pools = [
        {"name": name, "route_prefix": route, "models": [{"name": "linear"}], "resources": {"cpus": 0.5}}
        for name, route in (("whole", "/"), ("part", "/pools/a"))
    ]
    spec = {"storage": {"uri": store.uri}, "http": {"port": ray_cluster.http_port}, "pools": pools}
    pool.deploy(ServeSpec.model_validate(spec))
    try:
        for base in ("", "/pools/a"):
            for path in ROUTES:
                assert statuses(ray_cluster.http_port, "GET", base + path) in (200, 405), base + path
            for path in NO_ROUTES:
                if is_a_line(base + path) and base + path != "/":
                    assert statuses(ray_cluster.http_port, "GET", base + path) == 404, base + path
        for path in ("/pools%2fa/v2/models", "/%70ools/a/v2/models", "/pools//a/v2/models", "/pools/./a/v2/models"):
            assert statuses(ray_cluster.http_port, "GET", path) == 404, path
    finally:
        pool.undeploy(["whole", "part"])


METHODS = [
    "/inference.GRPCInferenceService%2fServerLive", "//inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerLive/", "/inference.GRPCInferenceService//ServerLive",
    "/inference.grpcinferenceservice/ServerLive", "/inference.GRPCInferenceService/serverlive",
    "/inference.GRPCInferenceService/Server%4cive", "/x/../inference.GRPCInferenceService/ServerLive",
    "/inference.GRPCInferenceService/ServerLive?a=b", "/inference.GRPCInferenceService/ServerLive;a=b",
]  # fmt: skip


def test_the_name_of_a_grpc_method_is_compared_as_it_was_sent(server: Server) -> None:
    from maas_ray.serve.grpc.server import Rpcs
    from maas_ray.serve.grpc.service import Service

    async def codes() -> list[grpc.StatusCode | None]:
        listener = grpc.aio.server()
        limits = app_spec(server.store, "linear").limits
        listener.add_generic_rpc_handlers((Rpcs(Service(_handler(server), limits)).handlers(),))
        port = listener.add_insecure_port("127.0.0.1:0")
        await listener.start()
        found: list[grpc.StatusCode | None] = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method in ["/inference.GRPCInferenceService/ServerLive", *METHODS]:
                try:
                    await channel.unary_unary(method)(b"", timeout=10)
                    found.append(None)
                except grpc.aio.AioRpcError as error:
                    found.append(error.code())
        await listener.stop(0)
        return found

    assert server.call(codes()) == [None, *[grpc.StatusCode.UNIMPLEMENTED] * len(METHODS)]
