"""The 404 of a repository load listed the whole registry and the store's URI to any client; a model must not have
the name of a path segment of the protocol. Errors for clients name the models of their pool, and no store, host, path
or key.
"""

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import requests
from pydantic import ValidationError

from maas_ray.errors import MaasError, NotFound, ObjectCorrupt, SpecError, StoreDenied, StoreError, StoreUnavailable
from maas_ray.registry.models import ROUTES, Registry
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import Service
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.models.public_errors import for_callers, original
from maas_ray.serve.request.head import find_route
from maas_ray.serve.spec.pools import PoolSpec
from maas_ray.store.objects import open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.serve.http.test_asgi_app import ROW
from tests.serve.models.test_manager import break_bundle
from tests.support.onnx_models import commit_bundle, linear

OTHERS = ("secret-salaries", "hidden-merger")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A pool of `linear` and `broken`, whose bytes are damaged, in a registry that has other models."""
    store = open_store(f"file://{tmp_path_factory.mktemp('private-place')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    for number, name in enumerate(OTHERS):
        publish(store, name, commit_bundle(store, linear(3.0 + number)))
    Registry(store).publish("unpromoted", commit_bundle(store, linear(9.0)))
    damaged = commit_bundle(store, linear(5.0))
    publish(store, "broken", damaged)
    break_bundle(store, damaged)
    spec = app_spec(store, "linear", model_control="explicit")
    yield from serve_app(store, spec.model_copy(update={"models": (*spec.models, _pattern())}), "protocol")


def _pattern() -> Any:
    from maas_ray.serve.spec.pools import ServedModelSpec

    return ServedModelSpec(name="brok*")


ASKED = [
    ("POST", "/v2/repository/models/nobody/load"), ("POST", "/v2/repository/models/unpromoted/load"),
    ("POST", "/v2/repository/models/nobody/unload"), ("POST", "/v2/repository/models/broken/load"),
    ("POST", "/v2/repository/models/stats/load"), ("GET", "/v2/models/nobody"), ("GET", "/v2/models/nobody/ready"),
    ("GET", "/v2/models/nobody/config"), ("GET", "/v2/models/nobody/stats"), ("GET", "/v2/models/nobody/versions"),
    ("GET", "/v2/models/nobody/versions/3"), ("GET", "/v2/models/linear/versions/77"), ("POST", "/v2/models/nobody/infer"),
    ("POST", "/v2/models/linear/versions/77/infer"), ("GET", "/v2/models/broken"), ("GET", "/v2/models/broken/ready"),
    ("GET", "/v2/models/broken/config"), ("POST", "/v2/models/broken/infer"), ("GET", "/nowhere"), ("PUT", "/v2/models"),
    ("POST", "/v2/models/secret-salaries/infer"), ("POST", "/v2/repository/index"), ("GET", "/metrics"),
]  # fmt: skip


def refuse_what_others_have(text: str, path: str) -> None:
    for word in ("private-place", "file://", "/tmp", "bundles/", "registry/", "Traceback", *OTHERS):
        assert word not in text or word in path, (path, text[:500])


@pytest.mark.parametrize(("method", "path"), ASKED)
def test_no_response_names_data_of_other_clients(server: Server, method: str, path: str) -> None:
    body = ROW if path.endswith("infer") else {}
    answer = requests.request(method, server.url + path, json=body if method == "POST" else None, timeout=30)
    refuse_what_others_have(answer.text + str(answer.headers), path)
    if "nobody" in path or "77" in path or "unpromoted" in path:
        assert answer.status_code == 404


def test_no_grpc_response_names_data_of_other_clients(server: Server) -> None:
    asked = [
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="nobody")),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="unpromoted")),
        ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="broken")),
        ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="nobody")),
        ("ModelMetadata", pb.ModelMetadataRequest(name="nobody")),
        ("ModelMetadata", pb.ModelMetadataRequest(name="broken")),
        ("ModelConfig", pb.ModelConfigRequest(name="nobody", version="3")),
        ("ModelStatistics", pb.ModelStatisticsRequest(name="nobody")),
        ("ModelInfer", pb.ModelInferRequest(model_name="broken")),
        ("ModelInfer", pb.ModelInferRequest(model_name="nobody")),
    ]

    async def details() -> list[str]:
        listener = grpc.aio.server()
        limits = app_spec(server.store, "linear").limits
        listener.add_generic_rpc_handlers((Rpcs(Service(server.front.handler, limits)).handlers(),))
        port = listener.add_insecure_port("127.0.0.1:0")
        await listener.start()
        found = []
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for method, message in asked:
                call = channel.unary_unary(f"/inference.GRPCInferenceService/{method}")
                try:
                    await call(message.SerializeToString(), timeout=30)
                except grpc.aio.AioRpcError as error:
                    found.append(f"{error.details()} {error.trailing_metadata()}")
        await listener.stop(0)
        return found

    texts = server.call(details())
    assert len(texts) == len(asked), "all of them are refused"
    for (method, _), text in zip(asked, texts, strict=True):
        refuse_what_others_have(text, method)


def test_the_operator_who_starts_a_replica_sees_the_whole_reason(server: Server) -> None:
    manager = ModelManager(server.store, app_spec(server.store, "nobody"))
    with pytest.raises(NotFound, match="no model 'nobody' in file://.*; models: .*secret-salaries"):
        server.call(manager.start())


def test_the_log_has_the_whole_reason(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        answer = requests.post(f"{server.url}/v2/repository/models/broken/load", json={}, timeout=30)
    assert answer.status_code == 500
    assert "sha256" in answer.json()["error"]
    assert any("the committed object bundles/" in record.getMessage() for record in caplog.records)


SECRET = "http://10.1.2.3:9000/bucket/key of model-x"


@pytest.mark.parametrize(
    "error",
    [NotFound(SECRET), StoreError(SECRET), StoreUnavailable(SECRET), StoreDenied(SECRET), ObjectCorrupt(SECRET)],
)
def test_an_error_of_the_store_keeps_its_class_and_hides_its_words(error: MaasError) -> None:
    error.__cause__ = type(error)("of the same class")
    shown = for_callers(error, "version 3 of model 'linear'")
    assert type(shown) is type(error)
    assert SECRET not in str(shown)
    assert "version 3 of model 'linear'" in str(shown)
    assert original(shown) is error
    assert for_callers(shown, "another thing") is shown
    assert original(error) is error


@pytest.mark.parametrize("name", sorted(ROUTES))
def test_no_model_is_named_as_a_word_of_the_paths(server: Server, name: str) -> None:
    with pytest.raises(SpecError, match="reserved for the protocol's paths"):
        Registry(server.store).publish(name, "some-bundle")


def test_every_word_of_a_route_is_such_a_word() -> None:
    """Whatever path leads somewhere, none of its words can be a model's name."""
    paths = ("v2", "v2/health/live", "v2/health/ready", "metrics", "v2/models/stats", "v2/repository/index",
             "v2/repository/models/x/load", "v2/repository/models/x/unload", "v2/models/x/versions", "v2/models/x/ready",
             "v2/models/x/config", "v2/models/x/stats", "v2/models/x/infer")  # fmt: skip
    for path in paths:
        find_route(f"/{path}")
        assert set(path.split("/")) - {"x"} <= ROUTES


@pytest.mark.parametrize("route", ["/v2", "/v2/models", "/metrics", "/a/v2", "/a/metrics/b"])
def test_no_pool_takes_the_paths_of_another_ones_protocol(route: str) -> None:
    with pytest.raises(ValidationError, match="would hide paths of the protocol"):
        PoolSpec(models=({"name": "linear"},), route_prefix=route)
    free = route.replace("v2", "v2x").replace("metrics", "my-metrics")
    assert PoolSpec(models=({"name": "linear"},), route_prefix=free).route_prefix == free
