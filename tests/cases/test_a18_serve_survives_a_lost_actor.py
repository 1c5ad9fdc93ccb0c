"""A18: the first `serve` on a very busy machine ended with an untyped "actor is dead"."""

from collections.abc import Callable

import pytest
import ray
from ray.serve.exceptions import RayServeException

from maas_ray.errors import ClusterError, NotFound
from maas_ray.serve.deploy import pools
from maas_ray.serve.spec import ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from tests.serve.conftest import publish
from tests.support.bundles import save_toy_bundle

LOST: list[Callable[[], Exception]] = [
    ray.exceptions.RayActorError,
    lambda: ray.exceptions.ActorUnavailableError("The actor is temporarily unavailable.\nIt may be restarting.", None),
    lambda: RayServeException("There is no Serve instance running on this Ray cluster."),
    lambda: ray.exceptions.GetTimeoutError("Get timed out"),
]


@pytest.fixture
def spec(file_store: ObstoreStore, monkeypatch: pytest.MonkeyPatch) -> ServeSpec:
    publish(file_store, "m", save_toy_bundle(file_store))
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(pools, "RETRY_S", 0.05)
    described = [{"name": "p", "models": [{"name": "m"}]}]
    return parse_spec(ServeSpec, {"storage": {"uri": file_store.uri}, "pools": described})


@pytest.mark.parametrize("lost", LOST)
def test_it_tries_again_within_its_time(
    spec: ServeSpec, monkeypatch: pytest.MonkeyPatch, lost: Callable[[], Exception]
) -> None:
    errors = [lost(), lost()]

    def deploy(*_: object) -> list[pools.PoolStatus]:
        if errors:
            raise errors.pop()
        return []

    monkeypatch.setattr(pools, "_deploy", deploy)
    assert pools.deploy(spec, timeout_s=30) == []
    assert errors == []


@pytest.mark.parametrize("lost", LOST)
def test_what_lasts_is_typed_and_says_the_way_out(
    spec: ServeSpec, monkeypatch: pytest.MonkeyPatch, lost: Callable[[], Exception]
) -> None:
    def deploy(*_: object) -> list[pools.PoolStatus]:
        raise lost()

    monkeypatch.setattr(pools, "_deploy", deploy)
    with pytest.raises(
        ClusterError, match=r"lost an actor .* within 0\.2 s: .*deploy again, with a larger --timeout-s"
    ) as caught:
        pools.deploy(spec, timeout_s=0.2)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_repeated(spec: ServeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0

    def deploy(*_: object) -> list[pools.PoolStatus]:
        nonlocal count
        count += 1
        raise NotFound("no model") if count == 1 else ray.exceptions.RaySystemError("broken")

    monkeypatch.setattr(pools, "_deploy", deploy)
    with pytest.raises(NotFound):
        pools.deploy(spec, timeout_s=30)
    with pytest.raises(ClusterError, match="Ray failed while the pools were deployed"):
        pools.deploy(spec, timeout_s=30)
    assert count == 2
