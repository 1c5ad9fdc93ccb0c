"""Fronts under attack: each one a real server on a real socket."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import pytest

from maas_ray.store.objects import open_store
from tests.attacks.cases import MAX_BODY_BYTES, Case, Status
from tests.serve.conftest import app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, linear

FrontName = Literal["plain", "protocol", "haproxy"]


@dataclass(frozen=True)
class Front:
    """A server, and how its expectations differ."""

    name: FrontName
    port: int

    def status(self, case: Case) -> Status:
        """Correct responses of this front."""
        more: dict[str, Status] = {"plain": case.plain, "haproxy": case.haproxy}
        return case.status | more.get(self.name, frozenset())

    def then(self, case: Case) -> str:
        """What this front does with the connection."""
        return {"plain": case.plain_then, "haproxy": case.haproxy_then}.get(self.name) or case.then


def _params() -> list[object]:
    marks = (pytest.mark.fault, pytest.mark.xdist_group("cluster"))
    return [pytest.param(name, marks=marks if name == "haproxy" else ()) for name in get_args(FrontName)]


@pytest.fixture(scope="module", params=_params())
def front(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Front]:
    """Serves `linear` (y = 2x) behind each front; HAProxy and a cluster only among the long tests."""
    store = open_store(f"file://{tmp_path_factory.mktemp('edge')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0)))
    limits = {"max_body_bytes": MAX_BODY_BYTES}
    if request.param == "haproxy":
        yield from _behind_haproxy(request.getfixturevalue("ray_cluster").http_port, store.uri, limits)
    else:
        for server in serve_app(store, app_spec(store, "linear", limits=limits), request.param):
            yield Front(request.param, server.port)


def _behind_haproxy(port: int, store: str, limits: dict[str, int]) -> Iterator[Front]:
    from maas_ray.serve.deploy import pool
    from maas_ray.serve.spec.serve import ServeSpec

    described = {"name": "edge", "models": [{"name": "linear"}], "resources": {"cpus": 0.5}, "limits": limits}
    pool.deploy(ServeSpec.model_validate({"storage": {"uri": store}, "http": {"port": port}, "pools": [described]}))
    try:
        yield Front("haproxy", port)
    finally:
        pool.undeploy(["edge"])
