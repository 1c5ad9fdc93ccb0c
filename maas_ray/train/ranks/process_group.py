"""The process group of a run's ranks: where they meet, joining it and leaving it. Knows no Ray.

torch is imported when a rank joins: the process that starts the ranks names these functions and needs no torch.
"""

import os
import signal
import socket
import threading
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING

from maas_ray.process.garbage import collect_rarely
from maas_ray.process.interrupts import take_first

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_ATTEMPT = "MAAS_RAY_ATTEMPT"
_told_to_end = threading.Event()


def free_address(host: str) -> str:
    """`host:port` with a port that was free a moment ago on this machine, where rank 0 will listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def join(
    address: str, backend: str, rank: int, world: int, timeout_s: float, variables: Mapping[str, str], attempt: int
) -> None:
    """Joins the default process group of torch.distributed.

    Args:
        address: where rank 0 listens.
        backend: `gloo` or `nccl`.
        rank: of this process.
        world: number of ranks.
        timeout_s: longest wait of any operation of the group.
        variables: put into this process's environment first, such as `LOCAL_RANK`.
        attempt: number of the attempt that this group is for; see `attempt`.
    """
    os.environ.update(variables, **{_ATTEMPT: str(attempt)})
    _heed_sigterm()
    collect_rarely()
    import torch.distributed as dist

    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def bound_waits(mesh: "DeviceMesh", timeout_s: float) -> None:
    """Gives the groups of a mesh the bound of the default group: torch gives them 30 minutes, or 10 with NCCL.

    Args:
        mesh: of named dimensions, each of which has a group.
        timeout_s: longest wait of any operation of these groups.
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout

    for name in mesh.mesh_dim_names or ():
        _set_pg_timeout(timedelta(seconds=timeout_s), mesh.get_group(name))


def attempt() -> int:
    """Number of the attempt for which this process has joined a group."""
    return int(os.environ[_ATTEMPT])


def notice() -> str | None:
    """Why this process is to end soon, if it was told so."""
    return "was sent SIGTERM" if _told_to_end.is_set() else None


def leave() -> None:
    """Leaves the group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _heed_sigterm() -> None:
    """Takes the first SIGTERM as a notice, and the second one as it was taken before.

    Whoever takes a machine away sends one and waits, for tens of seconds, before it kills: time for a checkpoint. Ray
    itself kills workers without it, or soon after it.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python allows handlers in the main thread alone, where Ray's actors run by default
    take_first([signal.SIGTERM], lambda number: _told_to_end.set())
