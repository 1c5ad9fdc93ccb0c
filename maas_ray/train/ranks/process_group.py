"""The process group of a run's ranks: address, joining and leaving. Independent of Ray.

torch is imported when a rank joins: the process that starts the ranks only references these functions.
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
    """`host:port` for rank 0 to listen on, with a port that was free a moment ago on this machine."""
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
        address: address of rank 0.
        backend: `gloo` or `nccl`.
        rank: rank of this process.
        world: number of ranks.
        timeout_s: timeout of each operation of the group.
        variables: environment variables that are set first, such as `LOCAL_RANK`.
        attempt: number of the attempt of this group; see `attempt`.
    """
    os.environ.update(variables, **{_ATTEMPT: str(attempt)})
    _heed_sigterm()
    collect_rarely()
    import torch.distributed as dist

    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def bound_waits(mesh: "DeviceMesh", timeout_s: float) -> None:
    """Sets the timeout of a mesh's groups to that of the default group; torch's is 30 minutes, or 10 with NCCL.

    Args:
        mesh: mesh with named dimensions, each of which has a group.
        timeout_s: timeout of each operation of these groups.
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout

    for name in mesh.mesh_dim_names or ():
        _set_pg_timeout(timedelta(seconds=timeout_s), mesh.get_group(name))


def attempt() -> int:
    """Number of the attempt whose group this process has joined."""
    return int(os.environ[_ATTEMPT])


def notice() -> str | None:
    """The reason why this process must end soon, or None."""
    return "received SIGTERM" if _told_to_end.is_set() else None


def leave() -> None:
    """Leaves the group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _heed_sigterm() -> None:
    """Makes the first SIGTERM a notice; the second one has its previous effect.

    Cloud providers and init systems send SIGTERM tens of seconds before they kill a machine: time for a checkpoint. Ray
    itself kills workers without it, or soon after it.
    """
    if threading.current_thread() is not threading.main_thread():
        return  # Python allows handlers only in the main thread, where Ray's actors run by default
    take_first([signal.SIGTERM], lambda number: _told_to_end.set())
