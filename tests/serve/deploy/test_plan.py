"""Deployment plans from the free resources of nodes: rollout steps, texts and refusals. No cluster."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from maas_ray.cluster.capacity.nodes import Node
from maas_ray.errors import ResourcesMissing
from maas_ray.serve.deploy.binding import application_spec, version_of
from maas_ray.serve.deploy.plan import NoRoomNow, UpdatePlan, plan
from maas_ray.serve.deploy.room import FreeResources, can_replace
from maas_ray.serve.deploy.standing import ReplicaState, Standing
from maas_ray.serve.deploy.way import FIRST_START, Way
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import parse_spec

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


def described(**pool: Any) -> ServeSpec:
    pools = [{"name": "p", "models": [{"name": "m"}], **pool}]
    return parse_spec(ServeSpec, {"storage": {"uri": "/store"}, "pools": pools})


def node(name: str, free: float, total: float = 4.0, **more: Any) -> Node:
    labels = more.pop("labels", {})
    return Node(name, f"10.0.0.{ord(name)}", {"CPU": total, **more}, {"CPU": free, **more}, labels)


def running(spec: ServeSpec, *nodes: str) -> Standing:
    application = application_spec(spec.pools[0], spec)
    replicas = [ReplicaState(f"r{number}", "RUNNING", on) for number, on in enumerate(nodes)]
    return Standing("p", "RUNNING", "/", application, version_of(application), replicas)


def planned(spec: ServeSpec, standing: Standing | None, *nodes: Node, may_grow: bool = False) -> UpdatePlan:
    pool = spec.pools[0]
    return plan(pool, application_spec(pool, spec), standing, nodes, may_grow)


TWO = {"replicas": 2, "resources": {"cpus": 1.5}}
NEW = {"server_name": "new"}


@pytest.mark.parametrize(
    ("pool", "free", "what", "surge_percent", "says"),
    [
        (TWO, 1.0, "nothing changes", 100, ""),
        ({**TWO, "replicas": 1}, 1.0, "nothing changes", 100, ""),
        ({**TWO, **NEW}, 3.0, "update", 100, "all new replicas start first; no loss of capacity"),
        ({**TWO, **NEW}, 1.5, "update", 50, "1 at a time, the new ones first; no loss of capacity"),
        ({**TWO, **NEW}, 1.0, "update", 0, "one at a time: 1 of 2 replicas is unavailable at a time"),
        ({**TWO, "replicas": 3}, 1.5, "scaling", 100, ""),
    ],
)
def test_an_update_loses_as_little_capacity_as_the_free_resources_allow(
    pool: dict[str, Any], free: float, what: str, surge_percent: int, says: str
) -> None:
    found = planned(described(**pool), running(described(**TWO), "a", "a"), node("a", free, 6.0))
    assert (found.what, found.way.surge_percent) == (what, surge_percent)
    assert str(found).endswith(says)


def test_a_plan_names_the_needed_and_the_free_resources_of_each_node() -> None:
    found = planned(
        described(**TWO, placement={"accelerator": "L4"}),
        None,
        node("a", 4.0, **{"accelerator_type:L4": 1}),
        node("b", 2.0),
    )
    assert str(found) == (
        "pool 'p': first start, needs 2 × 1.5 CPU, L4 available, free: 4 CPU, L4 available on 10.0.0.97 (node a); "
        "2 CPU, L4 not available on 10.0.0.98 (node b)"
    )


@pytest.mark.parametrize(
    ("pool", "says"),
    [
        (
            {"replicas": 3, "resources": {"cpus": 2.5}},
            "can never run .* needs 3 × 2.5 CPU, but only 2 fit on its 2 nodes",
        ),
        ({"placement": {"labels": {"zone": "x"}}}, r"only 0 fit on its 0 nodes with the labels \{'zone': 'x'\}"),
        ({"replicas": 3, "placement": "one_per_node"}, "one per node, but only 2 fit"),
        ({"resources": {"gpus": 1}}, "needs 1 × 1 CPU, 1 GPU, but only 0 fit"),
        ({"replicas": {"min": 0, "max": 3}, "resources": {"cpus": 9}}, "needs 1 × 9 CPU"),  # it could never wake
    ],
)
def test_what_can_never_run_is_refused_with_the_numbers(pool: dict[str, Any], says: str) -> None:
    with pytest.raises(ResourcesMissing, match=says) as caught:
        planned(described(**pool), None, node("a", 4.0), node("b", 4.0))
    assert not isinstance(caught.value, NoRoomNow)


def test_resources_of_others_may_become_free() -> None:
    spec = described(**TWO)
    with pytest.raises(NoRoomNow, match="needs 2 × 1.5 CPU, free: 2 CPU on .*; other workloads use the rest"):
        planned(spec, None, node("a", 2.0))
    assert planned(spec, None, node("a", 2.0), may_grow=True).way.surge_percent == 100  # an autoscaler adds nodes


def test_a_downtime_must_be_allowed() -> None:
    old, one = described(replicas=1, resources={"cpus": 3}), {"replicas": 1, "resources": {"cpus": 3}, **NEW}
    with pytest.raises(
        ResourcesMissing, match=r"without downtime: 1 × 3 CPU .* 1 running replica .*rollout\.allow_downtime"
    ):
        planned(described(**one), running(old, "a"), node("a", 1.0))
    found = planned(described(**one, rollout={"allow_downtime": True}), running(old, "a"), node("a", 1.0))
    assert found.way.is_away
    assert (found.way.surge_percent, found.way.step) == (0, 1.0)


def test_larger_replicas_start_in_steps_that_fit() -> None:
    old, new = described(replicas=4, resources={"cpus": 1}), {"replicas": 2, "resources": {"cpus": 2}}
    smaller = planned(described(**new), running(old, *"aaaa"), node("a", 0.0))
    assert smaller.way == Way(0, 2)  # the pool gets smaller first, which makes room for one
    # One fits in addition, on the other node; then the space of a single old one would be too small for the second.
    larger = described(replicas=2, resources={"cpus": 3})
    halves = running(described(**TWO), "a", "a")
    assert planned(larger, halves, node("a", 0.0, 3.0), node("b", 3.0, 3.0)).way == Way(0, 2)


def test_one_per_node_is_replaced_in_its_place_even_with_other_free_nodes() -> None:
    alone = {"replicas": 2, "placement": "one_per_node"}
    standing = running(described(**alone), "a", "b")
    assert planned(described(**alone, **NEW), standing, node("a", 9.0), node("b", 9.0)).way == Way(0, 2)
    assert planned(described(**alone, **NEW), standing, node("a", 9.0), node("b", 9.0), node("c", 9.0)).way == Way(1, 2)


def test_labels_choose_the_nodes() -> None:
    nodes = [node("a", 4.0, labels={"zone": "x"}), node("b", 4.0, labels={"zone": "y"})]
    for selector, chosen in (("x", "a"), ("!x", "b"), ("in(x,z)", "a")):
        found = planned(described(placement={"labels": {"zone": selector}}), None, *nodes)
        assert found.free.endswith(f"(node {chosen})")


@given(num=st.integers(1, 60), first=st.integers(0, 60))
def test_serves_percentages_round_to_the_replicas_that_were_meant(num: int, first: int) -> None:
    way = Way(min(first, num), num)
    assert (way.surge_percent * num + 99) // 100 == way.num_first  # as Serve rounds it up
    assert max(int(way.step * num), 1) == max(way.num_first, 1)  # and this one down
    assert FIRST_START.surge_percent == 100


@given(
    free=st.lists(st.integers(0, 4), min_size=1, max_size=4),
    old=st.lists(st.integers(0, 3), max_size=5),
    num=st.integers(1, 5),
    first=st.integers(0, 5),
    old_cpus=st.integers(1, 3),
    cpus=st.integers(1, 3),
)
def test_a_replacement_that_is_possible_fits_when_the_old_ones_are_gone(
    free: list[int], old: list[int], num: int, first: int, old_cpus: int, cpus: int
) -> None:
    nodes = [str(on % len(free)) for on in old]
    room = FreeResources({str(on): {"CPU": float(has)} for on, has in enumerate(free)}, taken=list(nodes))
    if can_replace(room, nodes, {"CPU": old_cpus}, {"CPU": cpus}, num, first):
        for on in nodes:
            room.release(on, {"CPU": old_cpus})
        assert room.place({"CPU": cpus}, num) == num
