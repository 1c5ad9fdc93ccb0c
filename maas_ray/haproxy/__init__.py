"""The HTTP front: HAProxy as started by Ray Serve, hardened and supervised. Imports nothing of Ray, and little else."""

from maas_ray.haproxy.launcher import main
from maas_ray.haproxy.names import HOST_FILE_VARIABLE, NOT_REPLAYABLE, REASON_FILE, REFUSED_FILE, REPLAYABLE

__all__ = ["HOST_FILE_VARIABLE", "NOT_REPLAYABLE", "REASON_FILE", "REFUSED_FILE", "REPLAYABLE", "main"]
