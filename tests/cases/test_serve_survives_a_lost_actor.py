"""The first `serve` on a very busy machine ended with an untyped "actor is dead"."""

from collections.abc import Callable

import pytest
import ray
from ray.serve.exceptions import RayServeException

from maas_ray.errors import ClusterError, NotFound
from maas_ray.serve.deploy import patience
from maas_ray.serve.deploy.patience import patiently

LOST: list[Callable[[], Exception]] = [
    ray.exceptions.RayActorError,
    lambda: ray.exceptions.ActorUnavailableError("The actor is temporarily unavailable.\nIt may be restarting.", None),
    lambda: RayServeException("There is no Serve instance running on this Ray cluster."),
    lambda: ray.exceptions.GetTimeoutError("Get timed out"),
]


@pytest.fixture(autouse=True)
def is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "RETRY_S", 0.05)


@pytest.mark.parametrize("lost", LOST)
def test_it_tries_again_within_its_time(lost: Callable[[], Exception]) -> None:
    errors = [lost(), lost()]

    def step() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert patiently(step, 30) == "done"
    assert errors == []


@pytest.mark.parametrize("lost", LOST)
def test_a_lasting_failure_is_typed_with_the_way_out(lost: Callable[[], Exception]) -> None:
    def step() -> None:
        raise lost()

    with pytest.raises(
        ClusterError, match=r"lost an actor .* within 0\.2 s: .*deploy again, with a larger --timeout-s"
    ) as caught:
        patiently(step, 0.2)
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_repeated() -> None:
    count = 0

    def step() -> None:
        nonlocal count
        count += 1
        raise NotFound("no model") if count == 1 else ray.exceptions.RaySystemError("broken")

    with pytest.raises(NotFound):
        patiently(step, 30)
    with pytest.raises(ClusterError, match="Ray failed while the pools were deployed"):
        patiently(step, 30)
    assert count == 2
