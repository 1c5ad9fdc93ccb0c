"""Limits of each pool, in a file next to HAProxy's directories. Written by replicas on each node, read by the launcher.

From Serve, HAProxy gets only the name, the path and the replicas of an application.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.names import LIMITS_FILE
from maas_ray.process.private_files import write_private


class PoolLimits(NamedTuple):
    """Limits of one pool that HAProxy enforces."""

    timeout_s: float
    """Maximum time until the response."""
    drain_s: float
    """Maximum time for which a stopping replica answers."""
    max_body_bytes: int
    """Maximum bytes of a request body."""


def limits_file(config_path: Path) -> Path:
    """Returns the path of the limits: Serve creates one directory for each node next to its configured path."""
    return config_path.parent.parent / LIMITS_FILE


def read_limits(path: Path) -> dict[str, PoolLimits]:
    """Returns the limits by application; empty if the file does not exist or is not valid."""
    try:
        document = json.loads(path.read_text())
        return {
            str(name): PoolLimits(float(entry["timeout_s"]), float(entry["drain_s"]), int(entry["max_body_bytes"]))
            for name, entry in document.items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def write_limits(path: Path, limits: Mapping[str, PoolLimits]) -> None:
    """Replaces the file, if the content differs. Raises `OSError`."""
    if dict(limits) != read_limits(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_private(path, json.dumps({name: entry._asdict() for name, entry in sorted(limits.items())}))
