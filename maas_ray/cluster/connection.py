"""Connects this process to a cluster: the recorded local one, or the one at `$RAY_ADDRESS`."""

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maas_ray.addresses import exempt_from_proxies
from maas_ray.cluster.node.state import load_state
from maas_ray.display import shown
from maas_ray.errors import ClusterError
from maas_ray.process import interrupts, search_path
from maas_ray.process.home import state_directory
from maas_ray.ray_internals import driver, gcs

ADDRESS_VARIABLE = "RAY_ADDRESS"
APP_DIR_VARIABLE = "MAAS_RAY_APP_DIR"
"""Directory of the modules that specs name by import path. Ray's workers search it too: it must exist on each node."""
JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the driver of a submitted job: the job's runtime environment, as JSON."""
MAX_NAME = 200
"""Longest name of a job on the dashboard, in characters."""
# Read at the import of ray.serve; a driver with other values would deploy for another kind of ingress.
_SERVE_FLAGS = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED")


def connect(
    *,
    state_dir: str | Path | None = None,
    address: str | None = None,
    timeout_s: float = 30.0,
    log_to_driver: bool = False,
) -> str:
    """Connects this process to Ray, once; a connected process keeps its connection.

    The cluster is `address`, else `$RAY_ADDRESS` (set by Ray in jobs), else the one that `up` recorded in
    `state_dir`, whose environment this process adopts.

    Args:
        state_dir: see `state_directory`.
        address: `host:port` of the head node.
        timeout_s: timeout for the head node; without it Ray retries forever.
        log_to_driver: whether this process prints the output of workers.

    Returns:
        The address of the cluster.

    Raises:
        ClusterError: no cluster exists, it does not answer, it refuses the token, or ray.serve was imported in this
            process with another environment.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE)
    state = None if address else load_state(state_dir)
    address = state.address if state else address
    if not address or "://" in address:
        where = f"no cluster is recorded in {state_directory(state_dir)}" if not address else f"{address!r} is a URL"
        raise ClusterError(
            f"{where}; start one with `maas-ray up`, or set {ADDRESS_VARIABLE} to host:port of a head node"
        )
    exempt_from_proxies(os.environ, [address.rpartition(":")[0].strip("[]")] if ":" in address else [])
    if (connected := connected_to()) is not None:
        if address not in ("auto", connected):
            raise ClusterError(f"this process is connected to {connected}, not to {address}; call disconnect() first")
        return connected
    if state is not None:
        use_environment(state.environment)

    import ray

    if address != "auto":
        check_head(address, timeout_s=timeout_s)
    try:
        with interrupts.kept():
            ray.init(address=address, job_config=_job(), log_to_driver=log_to_driver, logging_level="warning")
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise ClusterError(f"cannot join the Ray cluster {address}: {error}") from error
    return address


def _job() -> Any:
    """Ray's configuration of this driver: its workers search the same directories for imports, in the same order.

    Ray's default puts the driver's working directory first, even if the driver does not search it.
    """
    name = shown(" ".join([Path(sys.argv[0]).name, *sys.argv[1:]]))[:MAX_NAME]
    directory = os.environ.get(APP_DIR_VARIABLE)
    extra = str(Path(directory).resolve()) if directory else None
    if "working_dir" in os.environ.get(JOB_VARIABLE, ""):  # the code of a submitted job
        return driver.job_config([extra] if extra else [], is_submitted=True, name=name)
    return driver.job_config(search_path.of_workers(extra), is_submitted=False, name=name)


def disconnect() -> None:
    """Disconnects this process; the cluster continues to run."""
    if "ray" in sys.modules:
        import ray

        with interrupts.kept():
            ray.shutdown()


def connected_to() -> str | None:
    """`host:port` of the cluster that this process is connected to, or None. Does not import Ray."""
    if "ray" not in sys.modules:
        return None
    import ray

    return str(ray.get_runtime_context().gcs_address) if ray.is_initialized() else None


def check_head(address: str, *, timeout_s: float) -> None:
    """Raises `ClusterError` unless the head node accepts the token within the timeout; `ray.init` has no timeout."""
    hint = "; check that it runs (`maas-ray status`), that this is the head node's address and that it is reachable"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=timeout_s).close()
    except (OSError, ValueError) as error:
        raise ClusterError(f"the Ray cluster {address} does not answer: {error}{hint}") from error

    import ray

    try:
        gcs.get(address, b"maas-ray", b"maas-ray", timeout_s)
    except ray.exceptions.AuthenticationError as error:
        raise ClusterError(
            f"the Ray cluster {address} rejected the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH to the "
            "file of its token"
        ) from error
    except (ray.exceptions.RpcError, ray.exceptions.RaySystemError, ConnectionError) as error:
        raise ClusterError(f"the Ray cluster {address} does not answer: {error}{hint}") from error


def use_environment(environment: Mapping[str, str]) -> None:
    """Sets the variables of a cluster in this process, also after `import ray` as far as Ray allows it.

    Raises:
        ClusterError: ray.serve was imported in this process with another environment.
    """
    os.environ.update(environment)
    for name in _SERVE_FLAGS:
        if name in environment and driver.serve_flag(name) not in (None, environment[name] == "1"):
            raise ClusterError(
                f"ray.serve was imported before connect() with another value of {name} than the cluster's "
                f"({environment[name]!r}); call connect() first, or source the cluster's env.sh"
            )
    driver.read_environment_again()
