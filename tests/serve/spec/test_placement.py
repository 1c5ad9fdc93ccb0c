"""Placement and rollout specs, and how they are passed to Serve."""

from typing import Any

import pytest

from maas_ray.errors import SpecError
from maas_ray.serve.deploy.binding import application_spec, bind, version_of
from maas_ray.serve.spec.placement import PlacementSpec
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


def described(**pool: Any) -> ServeSpec:
    pools = [{"models": [{"name": "m"}], **pool}]
    return parse_spec(ServeSpec, {"storage": {"uri": "/store"}, "pools": pools})


def test_a_word_is_short_for_a_strategy() -> None:
    assert described(placement="pack").pools[0].placement == PlacementSpec(strategy="pack")
    assert described().pools[0].placement.strategy == "spread"
    kinds = PlacementSpec.model_json_schema()["anyOf"]
    assert {"type": "string", "enum": ["spread", "pack", "one_per_node"]} in kinds


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        ({"placement": "sprad"}, "placement.strategy.*'spread', 'pack' or 'one_per_node'"),
        ({"placement": {"label": {}}}, "unknown key 'pools.0.placement.label'; did you mean 'labels'"),
        ({"placement": {"labels": {"a b": "c"}}}, "'a b' is not the name of a node label"),
        ({"placement": {"labels": {"zone": "in(a"}}}, r"label 'zone' has the value 'in\(a'; use one value"),
        ({"placement": {"accelerator": "L4;"}}, "accelerator"),
        ({"rollout": {"timeout_s": 0}}, "timeout_s"),
        ({"rollout": {"surge": 1}}, "unknown key 'pools.0.rollout.surge'"),
    ],
)
def test_an_invalid_placement_is_named(pool: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        described(**pool)


def test_constraints_are_serves_own_options() -> None:
    placement = {"strategy": "one_per_node", "labels": {"zone": "!b"}, "accelerator": "L4"}
    spec = described(placement=placement)
    deployment = bind(application_spec(spec.pools[0], spec))._bound_deployment
    assert deployment._replica_config.max_replicas_per_node == 1
    assert deployment.ray_actor_options["label_selector"] == {"zone": "!b"}
    assert deployment.ray_actor_options["accelerator_type"] == "L4"


def test_only_what_replicas_are_started_with_replaces_them() -> None:
    def version(**pool: Any) -> str:
        spec = described(**pool)
        return version_of(application_spec(spec.pools[0], spec))

    assert version(replicas=3, rollout={"timeout_s": 9}) == version()
    assert version(placement="pack") != version()
