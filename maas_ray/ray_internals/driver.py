"""What Ray keeps of a process that connects to a cluster: values of its environment, and where workers import from.

Imports Ray when asked, or takes what this process has imported already. Read in Ray 2.60.0.
"""

import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any


def job_config(paths: Sequence[str], is_submitted: bool, name: str) -> Any:
    """Ray's `JobConfig` with the directories that the workers of this driver import from first.

    A runtime environment with this PYTHONPATH would be the public way; it doubles the time in which a worker starts.

    Args:
        paths: the directories, in order.
        is_submitted: whether this is the driver of a job with a working directory of its own; Ray adds nothing then.
            Else Ray would put the driver's working directory first, whether or not the driver looks there.
        name: of the job, for the dashboard.
    """
    from ray.job_config import JobConfig

    found = list(paths) if is_submitted else _Complete(paths)
    return JobConfig(metadata={"job_name": name}, _py_driver_sys_path=found)


class _Complete(list[str]):
    """A list that Ray's own additions leave as it is."""

    def extend(self, _: Iterable[str]) -> None:
        pass


def serve_flag(name: str) -> bool | None:
    """What ray.serve read of a variable (`RAY_SERVE_…`, yes or no) when this process imported it; None: it has not."""
    constants = sys.modules.get("ray.serve._private.constants")
    return None if constants is None else bool(getattr(constants, name))


def read_environment_again() -> None:
    """Makes Ray, if this process has imported it, take the present values of what it keeps from its import.

    Two values: whether this node's address is loopback, and the kind of auth.
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
