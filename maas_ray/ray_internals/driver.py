"""Ray's state in a driver process: values of its environment, and the import paths of its workers.

Imports Ray late, or uses the modules that this process has already imported. Read in Ray 2.60.0.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def job_config(paths: Sequence[str], is_submitted: bool, name: str) -> Any:
    """Ray's `JobConfig` with the directories that the workers of this driver search first for imports.

    The public way would be a runtime environment with PYTHONPATH, which doubles the start time of a worker.

    Args:
        paths: the directories, in order.
        is_submitted: whether this is the driver of a job with its own working directory, for which Ray adds nothing.
            Otherwise Ray would put the driver's working directory first, even if the driver does not search it.
        name: name of the job on the dashboard.
    """
    from ray.job_config import JobConfig

    found = list(paths) if is_submitted else _Complete(paths)
    return JobConfig(metadata={"job_name": name}, _py_driver_sys_path=found)


class _Complete(list[str]):
    """A list that ignores Ray's additions."""

    def extend(self, _: Iterable[str]) -> None:
        pass


def serve_flag(name: str) -> bool | None:
    """Value of a `RAY_SERVE_…` flag at this process's import of ray.serve; None if ray.serve was not imported."""
    constants = sys.modules.get("ray.serve._private.constants")
    return None if constants is None else bool(getattr(constants, name))


def read_environment_again() -> None:
    """Updates the values that Ray read from the environment at its import, if this process has imported Ray.

    Two values: whether this node's address is loopback, and the kind of authentication.
    """
    constants = sys.modules.get("ray._private.ray_constants")
    if constants is None:
        return
    constants.ENABLE_RAY_CLUSTER = os.environ.get("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER") != "0"  # type: ignore[attr-defined]
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def dashboard_address() -> str:
    """`host:port` of the dashboard of the cluster that this process is connected to."""
    import ray

    return str(ray._private.worker.get_dashboard_url())
