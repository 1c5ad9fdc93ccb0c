"""The autoscaler's limits: workers that fit on nodes that it may add are not refused."""

import pytest
import ray
import yaml

from maas_ray.cluster.capacity.autoscaler_limits import declare_limits
from maas_ray.cluster.capacity.preflight import preflight
from maas_ray.errors import ResourcesMissing, SpecError
from tests.conftest import RayCluster
from tests.support.root import ROOT

CONFIG = yaml.safe_load((ROOT / "cluster.yaml").read_text())


@pytest.fixture
def no_limits_afterwards():
    yield
    ray.experimental.internal_kv._internal_kv_del(
        ray._raylet.GCS_AUTOSCALER_CLUSTER_CONFIG_KEY.encode(),
        namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE.encode(),
    )


def test_nodes_that_the_autoscaler_may_add_count(ray_cluster: RayCluster, no_limits_afterwards):
    with pytest.raises(ResourcesMissing):
        preflight(2, {"CPU": 4, "GPU": 1})
    declare_limits(CONFIG)
    preflight(2, {"CPU": 4, "GPU": 1})
    gpu_nodes = CONFIG["available_node_types"]["gpu_worker"]["max_workers"]
    with pytest.raises(ResourcesMissing, match=f"which can run {gpu_nodes} of them"):
        preflight(gpu_nodes + 1, {"CPU": 4, "GPU": 1})


def test_a_config_without_node_types_is_refused():
    with pytest.raises(SpecError, match="available_node_types"):
        declare_limits({"cluster_name": "x"})
