"""Publishes the limits of every pool to the HAProxy of each node, by Ray's key-value store and a file.

Each replica first publishes the limits of its own pool; on each node one process that serves HTTP (a replica or a
proxy) copies all of them, so that a front also knows pools that have no replica on its node, or none at all.
"""

import fcntl
import json
import os
import re
import threading
from pathlib import Path

from maas_ray.display import get_logger
from maas_ray.haproxy.config.limits import PoolLimits, read_limits, write_limits
from maas_ray.haproxy.names import LIMITS_FILE
from maas_ray.ray_internals import kv
from maas_ray.serve.spec.limits import LimitsSpec

log = get_logger(__name__)

FOLLOW_S = 2.0
"""Seconds between two reads of the limits of pools that start elsewhere; their models take longer to load."""
_NAMESPACE = b"maas-ray"
_PREFIX = b"limits/"
_FILE_VARIABLE = "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"
_DEFAULT_FILE = "/tmp/haproxy-serve/haproxy.cfg"  # noqa: S108 (Serve's own)

_follower: threading.Thread | None = None


def publish(application: str, limits: LimitsSpec) -> None:
    """Publishes the limits of a pool to all nodes, and immediately to this one. Does nothing without HAProxy."""
    if not _has_haproxy():
        return
    entry = PoolLimits(limits.timeout_s, limits.drain_s, limits.max_body_bytes)
    name = _safe(application)
    kv.put(_PREFIX + name.encode(), json.dumps(entry._asdict()).encode(), _NAMESPACE)
    try:
        path = _file()
        write_limits(path, {**read_limits(path), name: entry})
    except OSError as error:
        log.warning("the limits of pool %s could not be passed to HAProxy of this node: %s", application, error)


def follow() -> None:
    """Keeps the file of this node up to date, unless another process does. Does nothing without HAProxy."""
    global _follower
    if _has_haproxy() and _follower is None:
        _follower = threading.Thread(target=_follow, name="front-limits", daemon=True)
        _follower.start()


def copy_all(path: Path) -> None:
    """Writes the published limits of every pool."""
    found = {}
    for key in kv.keys(_PREFIX, _NAMESPACE):
        value = kv.get(key, _NAMESPACE)
        if value is not None:
            found[key.removeprefix(_PREFIX).decode()] = PoolLimits(**json.loads(value))
    write_limits(path, found)


def _follow() -> None:
    path, pause = _file(), threading.Event()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                copy_all(path)
            except BlockingIOError:
                pass  # another process of this node follows them
            except Exception as error:  # in any case requests must not fail; the next attempt may succeed
                log.debug("the limits of the pools could not be read: %s", error)
            pause.wait(FOLLOW_S)


def _has_haproxy() -> bool:
    return os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"


def _file() -> Path:
    return Path(os.environ.get(_FILE_VARIABLE, _DEFAULT_FILE)).parent / LIMITS_FILE


def _safe(name: str) -> str:
    """Returns the name of an application as Serve writes it in HAProxy's configuration."""
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name.replace("#", "-").replace("/", "."))
