"""Claims of room on a cluster: serving writes one, training runs that hold room read it and give way. Knows neither.

Ray itself preempts nothing. A claim ends with whoever wrote it, or at its time at the latest, so that one that was
left behind holds no run back for good.
"""

import json
import time
from collections.abc import Callable

_KEY = b"maas-ray:claim:"
Clock = Callable[[], float]


def claim(what: str, seconds: float, clock: Clock = time.time) -> None:
    """Asks training runs for room; again with the same name to extend it.

    Args:
        what: who asks, which is the name of the claim: `pool 'digits'`.
        seconds: after which it is over.
        clock: seconds since 1970.
    """
    from ray.experimental.internal_kv import _internal_kv_put

    _internal_kv_put(_KEY + what.encode(), json.dumps({"until_s": clock() + seconds}), overwrite=True)


def end_claim(what: str) -> None:
    """Ends a claim; one that is not there is no error."""
    from ray.experimental.internal_kv import _internal_kv_del

    _internal_kv_del(_KEY + what.encode())


def claimed(clock: Clock = time.time) -> str | None:
    """Who asks for room, if anybody does."""
    from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list

    for key in _internal_kv_list(_KEY):
        if (value := _internal_kv_get(key)) is not None and json.loads(value)["until_s"] > clock():
            return bytes(key).removeprefix(_KEY).decode()
    return None
