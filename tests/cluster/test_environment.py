"""The environment, the priority and the dashboard of the session's shared cluster."""

import os

import ray
import requests

from tests.conftest import RayCluster


def test_workers_start_with_the_profile_and_the_credentials_of_the_caller(ray_cluster: RayCluster):
    @ray.remote
    def environment() -> dict[str, str]:
        return dict(os.environ)

    seen = ray.get(environment.remote(), timeout=60)
    assert {name: seen.get(name) for name in ray_cluster.env if not name.endswith("ADDRESS")} == {
        name: value for name, value in ray_cluster.env.items() if not name.endswith("ADDRESS")
    }
    assert seen["AWS_ACCESS_KEY_ID"] == os.environ["AWS_ACCESS_KEY_ID"]


def test_workers_run_at_the_priority_of_the_cluster(ray_cluster: RayCluster):
    @ray.remote
    def niceness() -> int:
        return os.nice(0)

    assert ray.get(niceness.remote(), timeout=60) == os.nice(0)


def test_the_dashboard_requires_the_token(ray_cluster: RayCluster):
    url = f"{ray_cluster.dashboard_url}/api/version"
    assert requests.get(url, timeout=10).status_code == 401
    assert requests.get(url, headers={"Authorization": "Bearer wrong"}, timeout=10).status_code == 403
    assert requests.get(url, headers={"Authorization": f"Bearer {ray_cluster.token}"}, timeout=10).ok
