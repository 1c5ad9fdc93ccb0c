"""Claims on resources of a cluster: serving writes a claim, and training runs read it and free resources.

Independent of both. Ray itself preempts nothing. The writer ends its claim; otherwise the claim expires, so that an
abandoned one does not block a run forever.
"""

import json
import time
from collections.abc import Callable

from maas_ray.ray_internals import kv

_KEY = b"maas-ray:claim:"
Clock = Callable[[], float]


def claim(what: str, seconds: float, clock: Clock = time.time) -> None:
    """Asks training runs to free resources; a further call with the same name extends the claim.

    Args:
        what: name of the claim and its owner: `pool 'digits'`.
        seconds: time until the claim expires.
        clock: returns seconds since 1970.
    """
    kv.put(_KEY + what.encode(), json.dumps({"until_s": clock() + seconds}).encode())


def end_claim(what: str) -> None:
    """Ends a claim, if it exists."""
    kv.delete(_KEY + what.encode())


def claimed(clock: Clock = time.time) -> str | None:
    """The name of a current claim, or None."""
    for key in kv.keys(_KEY):
        if (value := kv.get(key)) is not None and json.loads(value)["until_s"] > clock():
            return bytes(key).removeprefix(_KEY).decode()
    return None
