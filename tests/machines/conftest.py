"""Clusters of several hosts, started by cluster.yaml's own commands. `make test-cluster` runs what is here."""

from collections.abc import Iterator

import pytest

from tests.support.hosts import Network, ray_cluster, why_not
from tests.support.hosts.served import publish


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if "machines" in item.path.parts:
            item.add_marker(pytest.mark.machines)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(1800))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="module")
def machines() -> Iterator[Network]:
    """A head and two workers of three CPUs, and a store with the model `linear`, y = 2 x."""
    with Network(3) as network:
        publish(network)
        ray_cluster.start(network, num_cpus=3)
        yield network
