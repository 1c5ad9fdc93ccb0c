"""Runs a function on several gloo ranks in processes of this machine, for tests of the pure torch parts."""

import multiprocessing
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world: int, *arguments: Any) -> list[Any]:
    """Calls `function(rank, *arguments)` on every rank; returns what each one returned, by rank."""
    with tempfile.TemporaryDirectory(prefix="maas-ranks-") as directory:
        # Forked from a process that has imported everything once, what optimizers import on first use included.
        multiprocessing.set_forkserver_preload([__name__, function.__module__, "torch._dynamo"])
        mp.start_processes(_rank, (world, directory, function, arguments), nprocs=world, start_method="forkserver")
        return [torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(world)]


def _rank(rank: int, world: int, directory: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meet", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(function(rank, *arguments), Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
