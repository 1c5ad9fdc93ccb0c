"""Claims of room on a cluster: serving writes one, training runs that hold room read it and give way. Knows neither.

Ray itself preempts nothing. A claim ends with whoever wrote it, or at its time at the latest, so that one that was
left behind holds no run back for good.
"""

import json
import time
from collections.abc import Callable

from maas_ray.ray_internals import kv

_KEY = b"maas-ray:claim:"
Clock = Callable[[], float]


def claim(what: str, seconds: float, clock: Clock = time.time) -> None:
    """Asks training runs for room; again with the same name to extend it.

    Args:
        what: who asks, which is the name of the claim: `pool 'digits'`.
        seconds: after which it is over.
        clock: seconds since 1970.
    """
    kv.put(_KEY + what.encode(), json.dumps({"until_s": clock() + seconds}).encode())


def end_claim(what: str) -> None:
    """Ends a claim; one that is not there is no error."""
    kv.delete(_KEY + what.encode())


def claimed(clock: Clock = time.time) -> str | None:
    """Who asks for room, if anybody does."""
    for key in kv.keys(_KEY):
        if (value := kv.get(key)) is not None and json.loads(value)["until_s"] > clock():
            return bytes(key).removeprefix(_KEY).decode()
    return None
