"""Refusals and derived values of a ServeSpec."""

from typing import Any

import pytest
import yaml

from maas_ray.errors import SpecError
from maas_ray.serve.spec.pools import ApplicationSpec
from maas_ray.serve.spec.serve import ServeSpec
from maas_ray.spec import load_spec, parse_spec
from tests.support.root import ROOT

POOL = {"models": [{"name": "m"}]}
TLS = {"certificate": "c.pem", "key": "k.pem"}


def test_the_smallest_spec_has_safe_defaults() -> None:
    spec = parse_spec(ServeSpec, {"pools": [POOL]})
    assert (spec.http.host, spec.profile) == ("127.0.0.1", "fast")
    pool = spec.pools[0]
    assert (pool.models[0].ref, pool.replicas, pool.route_prefix) == ("production", 1, "/")
    assert pool.max_ongoing_requests > pool.batching.max_queued_requests + pool.batching.max_batch_size
    assert pool.scaling.target_ongoing < pool.max_ongoing_requests


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"pools": []}, "at least 1 item"),
        ({"pools": [{"models": []}]}, "at least 1 item"),
        ({"pools": [POOL], "http": {"tls": TLS}}, "needs profile 'portable'.*64260"),
        ({"pools": [POOL, {**POOL, "route_prefix": "/b"}]}, "same name: default"),
        ({"pools": [POOL, {**POOL, "name": "b"}]}, "same route_prefix: /"),
        ({"pools": [{**POOL, "route_prefix": "a"}]}, "a route prefix is '/' or segments"),
        ({"pools": [{**POOL, "route_prefix": "/a/"}]}, "a route prefix is '/' or segments"),
        ({"pools": [{"models": [{"name": "m"}, {"name": "m"}]}]}, r"lists m \(production\) more than once"),
        ({"pools": [{"models": [{"name": "m", "alias": "a", "version": 1}]}]}, "alias and version are both set"),
        ({"pools": [{"models": [{"name": "../m"}]}]}, "pattern"),
        ({"pools": [{"models": [{"name": "team-*", "version": 1}]}]}, "matches many models"),
        ({"pools": [{**POOL, "memory_budget_bytes": 0}]}, "greater than 0"),
        ({"pools": [{**POOL, "model_control": "poll"}]}, "'none' or 'explicit'"),
        ({"pools": [{**POOL, "replicas": {"min": 3, "max": 2}}]}, "max 2 is below min 3"),
        ({"pools": [{**POOL, "replicas": 0}]}, "greater than 0"),
        ({"pools": [{**POOL, "limits": {"timeout": 3}}]}, "did you mean 'timeout_s'"),
        ({"pools": [POOL], "profile": "slow"}, "'fast' or 'portable'"),
    ],
)
def test_what_does_not_fit_together_is_refused_with_its_reason(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=f"(?s){message}"):
        parse_spec(ServeSpec, spec)


@pytest.mark.parametrize(
    "pool",
    [POOL, {"models": [{"name": "m", "version": 3}, {"name": "m", "alias": "a"}], "replicas": {"min": 1, "max": 4}}],
)
def test_a_spec_survives_the_way_to_a_replica(pool: dict[str, Any]) -> None:
    spec = parse_spec(ApplicationSpec, {**pool, "storage": {"uri": "/srv/store"}})
    assert parse_spec(ApplicationSpec, spec.model_dump(mode="json")) == spec


def test_tls_is_accepted_with_the_portable_profile() -> None:
    assert parse_spec(ServeSpec, {"pools": [POOL], "profile": "portable", "http": {"tls": TLS}}).http.tls


def test_the_application_builder_refuses_a_store_that_each_replica_would_read_differently() -> None:
    with pytest.raises(SpecError, match="relative directory"):
        parse_spec(ApplicationSpec, {**POOL, "storage": {"uri": ".maas-ray/store"}})
    parse_spec(ApplicationSpec, {**POOL, "storage": {"uri": "file:///srv/store"}})


# Ray's own use of pydantic, at import.
@pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")
def test_the_deployment_files_fit_serves_schema_and_ours() -> None:
    from ray.serve.schema import ServeDeploySchema

    files = sorted(ROOT.glob("deployments/*.yaml"))
    assert files
    for file in files:
        if "pools" in yaml.safe_load(file.read_text()):  # for `maas-ray serve`; the others are for `serve deploy`
            load_spec(ServeSpec, file)
            continue
        config = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
        assert config.http_options.host == "0.0.0.0"  # each node is reachable at its own addresses
        for application in config.applications:
            assert application.import_path == "maas_ray.serve:build"
            parse_spec(ApplicationSpec, application.args)
