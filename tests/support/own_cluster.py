"""A cluster of a test's own on this machine, for what would disturb the session's."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from maas_ray import cluster
from tests.conftest import SESSION_STATE_DIR, RayCluster


@contextmanager
def own_cluster(num_cpus: int) -> Iterator[RayCluster]:
    """A head with `num_cpus` logical CPUs and the fast profile, to which this process is connected during the block.

    Its environment becomes that of this process, since Ray Serve reads it here too. The session's cluster, if it runs, is
    left meanwhile.
    """
    before, was_connected = dict(os.environ), ray.is_initialized()
    if was_connected:
        cluster.disconnect()
    directory = Path(tempfile.mkdtemp(prefix="n", dir=tempfile.gettempdir()))  # short: Unix sockets lie below it
    state_dir = directory / "s"
    try:
        state = cluster.up(
            num_cpus=num_cpus, profile="fast", state_dir=state_dir, temp_dir=directory / "t",
            ports=cluster.choose_ports(http=0, dashboard=0),
        )  # fmt: skip
        env = {**state.environment, "RAY_ADDRESS": state.address, "RAY_API_SERVER_ADDRESS": state.dashboard_url}
        os.environ.update(state.environment)
        cluster.connect(state_dir=state_dir)
        yield RayCluster(state.address, state.dashboard_url, state.http_port, state.token(), env, state_dir)
    finally:
        cluster.disconnect()
        cluster.down(state_dir=state_dir, drain_timeout_s=0)
        shutil.rmtree(directory, ignore_errors=True)
        os.environ.clear()
        os.environ.update(before)
        if was_connected:
            cluster.connect(state_dir=SESSION_STATE_DIR)
