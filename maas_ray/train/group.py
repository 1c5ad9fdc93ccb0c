"""The process group of a run's ranks: where they meet, joining it and leaving it. Knows no Ray.

torch is imported when a rank joins: the process that starts the ranks names these functions and needs no torch.
"""

import os
import socket
from collections.abc import Mapping
from datetime import timedelta


def free_address(host: str) -> str:
    """`host:port` with a port that was free a moment ago on this machine, where rank 0 will listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as found:
        found.bind(("", 0))
        port = found.getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def join(address: str, backend: str, rank: int, world: int, timeout_s: float, variables: Mapping[str, str]) -> None:
    """Joins the default process group of torch.distributed.

    Args:
        address: where rank 0 listens.
        backend: `gloo` or `nccl`.
        rank: of this process.
        world: number of ranks.
        timeout_s: longest wait of any operation of the group.
        variables: put into this process's environment first, such as `LOCAL_RANK`.
    """
    os.environ.update(variables)
    import torch.distributed as dist

    dist.init_process_group(
        backend, init_method=f"tcp://{address}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout_s)
    )


def leave() -> None:
    """Leaves the group, if this process is in one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
