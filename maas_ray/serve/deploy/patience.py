"""Retries calls during which Ray Serve lost one of its actors: Serve restarts them, on a busy machine with a delay."""

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
"""Errors that Serve raises if one of its own actors died or did not answer in time."""

T = TypeVar("T")
log = get_logger(__name__)


def patiently(step: Callable[[], T], timeout_s: float) -> T:
    """Returns the result of `step`, retried for up to `timeout_s`.

    Raises:
        ClusterError: Serve's actors did not restart in time, or Ray itself failed.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return step()
        except STARTING as error:
            log.warning("Ray Serve lost an actor while the pools were deployed, retrying: %s", line(error))
            if time.monotonic() + RETRY_S > deadline:
                raise ClusterError(
                    f"Ray Serve lost an actor while the pools were deployed, and not all of its actors answered within "
                    f"{timeout_s:g} s: {line(error)}; the machine may be short of CPU or memory (see `ray status`): "
                    "deploy again, with a larger --timeout-s"
                ) from error
            forget_client()  # it belongs to a controller that may be dead
            time.sleep(RETRY_S)
        except ray.exceptions.RayError as error:
            raise ClusterError(f"Ray failed while the pools were deployed: {line(error)}; see `ray status`") from error


def line(error: BaseException) -> str:
    """Returns the message of an error in one line: Ray describes a dead actor on several."""
    return " ".join(str(error).split())[:500]
