"""The limits of each pool, in a file beside HAProxy's directories. Written by replicas on each node, read by the launcher.

Serve tells HAProxy nothing of an application but its name, its path and its replicas.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.names import LIMITS_FILE
from maas_ray.process.private_files import write_private


class PoolLimits(NamedTuple):
    """What HAProxy keeps of one pool."""

    timeout_s: float
    """Longest time to an answer."""
    drain_s: float
    """Longest time that a stopping replica answers."""
    max_body_bytes: int
    """Largest request body."""


def limits_file(config_path: Path) -> Path:
    """Where the limits are: Serve keeps one directory for each node beside the place that it was given."""
    return config_path.parent.parent / LIMITS_FILE


def read_limits(path: Path) -> dict[str, PoolLimits]:
    """Limits by application; empty if there is no such file or it holds something else."""
    try:
        document = json.loads(path.read_text())
        return {
            str(name): PoolLimits(float(entry["timeout_s"]), float(entry["drain_s"]), int(entry["max_body_bytes"]))
            for name, entry in document.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_limits(path: Path, limits: Mapping[str, PoolLimits]) -> None:
    """Replaces the file, if it differs. Raises `OSError`."""
    if dict(limits) != read_limits(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, json.dumps({name: entry._asdict() for name, entry in sorted(limits.items())}))
