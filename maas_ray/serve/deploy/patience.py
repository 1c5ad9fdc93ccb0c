"""Tries again where Ray Serve has lost one of its own actors: it starts them again, on a busy machine not at the first go."""

import time
from collections.abc import Callable
from typing import TypeVar

import ray
from ray.serve.exceptions import RayServeException

from maas_ray.display import get_logger
from maas_ray.errors import ClusterError
from maas_ray.ray_internals.serve import forget_client

RETRY_S = 2.0
STARTING = (ray.exceptions.RayActorError, RayServeException, TimeoutError)
"""What Serve raises when one of its own actors died or did not answer in time."""

T = TypeVar("T")
log = get_logger(__name__)


def patiently(step: Callable[[], T], timeout_s: float) -> T:
    """What `step` returns, tried for up to `timeout_s`.

    Raises:
        ClusterError: Serve's actors did not come back in time, or Ray itself failed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return step()
        except STARTING as error:
            log.warning("an actor of Ray Serve was lost while the pools were deployed, trying again: %s", line(error))
            if time.monotonic() + RETRY_S > deadline:
                raise ClusterError(
                    f"Ray Serve lost an actor while the pools were deployed, and not all answered within {timeout_s:g} s: "
                    f"{line(error)}; the machine may be too busy or short of memory (see `ray status`): deploy again, "
                    "with a larger --timeout-s"
                ) from error
            forget_client()  # from a controller that may be dead
            time.sleep(RETRY_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray failed while the pools were deployed: {line(error)}; see `ray status`") from error


def line(error: BaseException) -> str:
    """What an error says, in one line: Ray describes a dead actor on several."""
    return " ".join(str(error).split())[:500]
