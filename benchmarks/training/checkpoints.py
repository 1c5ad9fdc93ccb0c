"""Saving by itself: two ranks hold half of a model each. Run under torchrun; `measure_saving` starts it.

Figures per round: a save that is waited for, how long a step waits for one in the background, writing and fsyncing the
same number of random bytes on the same disk in each of `DISK` ways, and the bytes read to load the state cut in another
way. What comes first takes turns.

A step here is a product of matrices that takes about `COMPUTE_S`, for its forward and backward pass. What it waits for a
save is the time of a run's check that the state is finite, of `AsyncCheckpointer.save` and, before the update, of `AsyncCheckpointer.staged`; by
how much longer it computes beside the copy, the hashing and the writing is measured too (`slower_s`).
"""

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from maas_ray.checkpoint.async_checkpointer import AsyncCheckpointer
from maas_ray.checkpoint.catalog import open_checkpoint
from maas_ray.checkpoint.collectives import saving_group
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.store.objects import StorageSpec, open_store
from maas_ray.train.loop.nan_check import refuse_not_finite

RANKS = 2
WIDTH = 1024
COMPUTE_S = 0.25
TIMEOUT_S = 900.0
PART_BYTES = 64 << 20
"""What one object of a checkpoint holds at most, at these sizes."""
DISK: dict[str, int | None] = {"one file per rank": None, "files as large as parts": PART_BYTES}
"""How bytes are written and fsynced to compare a save with: name to bytes per file."""


def measure_saving(directory: Path, megabytes: int, rounds: int) -> dict[str, Any]:
    """Runs this file on two ranks and returns what it found."""
    out = directory / "saving.json"
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS)]
    argv += ["-m", "benchmarks.training.checkpoints", "--directory", str(directory / "saved"), "--out", str(out)]
    argv += ["--megabytes", str(megabytes), "--rounds", str(rounds)]
    root = Path(__file__).parents[2]
    done = subprocess.run(argv, cwd=root, capture_output=True, text=True, timeout=TIMEOUT_S, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"the program that saves failed: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def main() -> None:
    options = _options()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (RANKS,))
    rank = dist.get_rank()
    root = options.directory
    if rank == 0:
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir(parents=True)
    dist.barrier()
    rows = options.megabytes * 2**20 // (4 * WIDTH * 16) // RANKS * RANKS
    tensors = {f"model.layer_{i}": _cut(torch.rand(rows, WIDTH), mesh, 0) for i in range(16)}
    num_bytes = 16 * rows * WIDTH * 4
    store, group = open_store(StorageSpec(uri=str(root / "store"))), saving_group()
    checkpointer = AsyncCheckpointer(store, "background", group=saving_group())
    compute = _calibrated()
    found: dict[str, Any] = {"bytes": num_bytes, "rounds": []}
    for number in range(options.rounds + 1):
        snapshot = Snapshot(number, 0, tensors)
        one: dict[str, Any] = {"disk_s": {}}

        def write(kind: str, snapshot: Snapshot = snapshot, one: dict[str, Any] = one) -> None:
            raw = root / f"raw-{rank}-{snapshot.step}-{kind}"  # new, as a save writes: freeing old blocks takes time
            one["disk_s"][kind] = _timed(lambda: _write(raw, num_bytes // RANKS, DISK[kind]))

        def check(snapshot: Snapshot = snapshot) -> None:
            refuse_not_finite(snapshot.tensors, snapshot.step, torch.device("cpu"))

        def wait(snapshot: Snapshot = snapshot, one: dict[str, Any] = one) -> None:
            one["waited_s"] = _timed(lambda: save(store, "waited", snapshot, group))

        def train(snapshot: Snapshot = snapshot, one: dict[str, Any] = one) -> None:
            alone = _timed(compute)
            begun = _timed(check) + _timed(lambda: checkpointer.save(snapshot, steady=tensors))
            beside = _timed(compute)
            one["stall_s"] = begun + _timed(checkpointer.staged)
            one["slower_s"] = beside - alone
            checkpointer.wait(is_strict=True)

        turns = [wait, train, *(functools.partial(write, kind) for kind in DISK)]
        for turn in turns[number % len(turns) :] + turns[: number % len(turns)]:
            turn()
        if number:  # the first one pages buffers in, and learns which tensors are steady
            found["rounds"].append(one)
    checkpointer.close()
    committed = open_checkpoint(store, "waited")
    found["read_per_needed"] = {}
    for name, place in (("same cut", Shard(0)), ("other dimension", Shard(1)), ("whole on each rank", Replicate())):
        targets: dict[str, Tensor] = {
            key: DTensor.from_local(_empty(rows, place), mesh, [place], run_check=False) for key in tensors
        }
        needed = sum(target.to_local().nbytes for target in targets.values())  # type: ignore[attr-defined]
        seconds = _timed(lambda: found.__setitem__("read", load_into(committed, targets)))  # noqa: B023
        found["read_per_needed"][name] = {"ratio": found.pop("read") / needed, "s": seconds}
    if rank == 0:
        options.out.write_text(json.dumps(found))
        shutil.rmtree(root, ignore_errors=True)
    dist.barrier()
    dist.destroy_process_group()


def _cut(whole: Tensor, mesh: DeviceMesh, dim: int) -> DTensor:
    return DTensor.from_local(whole.chunk(RANKS, dim)[dist.get_rank()].clone(), mesh, [Shard(dim)], run_check=False)


def _empty(rows: int, place: Shard | Replicate) -> Tensor:
    if isinstance(place, Replicate):
        return torch.empty(rows, WIDTH)
    return torch.empty(rows // RANKS, WIDTH) if place.dim == 0 else torch.empty(rows, WIDTH // RANKS)


def _calibrated() -> Callable[[], None]:
    """Work that takes about `COMPUTE_S` where nothing else runs; the same on all ranks."""
    matrix = torch.rand(512, 512)
    once = min(_timed(lambda: torch.mm(matrix, matrix)) for _ in range(20))
    count = max(1, round(COMPUTE_S / once))

    def compute() -> None:
        for _ in range(count):
            torch.mm(matrix, matrix)

    return compute


def _write(path: Path, num_bytes: int, file_bytes: int | None) -> None:
    """As raw as it gets; the random bytes are drawn before the clock starts, for all rounds."""
    view = memoryview(_RANDOM.setdefault(num_bytes, os.urandom(num_bytes)))
    step = file_bytes or num_bytes
    for start in range(0, num_bytes, step):
        with path.with_name(f"{path.name}-{start}").open("wb", buffering=0) as file:
            rest = view[start : start + step]
            while rest:
                rest = rest[file.write(rest[: 8 << 20]) :]
            os.fsync(file.fileno())


_RANDOM: dict[int, bytes] = {}


def _timed(work: Callable[[], object]) -> float:
    """Seconds until the slowest rank is done."""
    dist.barrier()
    started = time.perf_counter()
    work()
    took = torch.tensor([time.perf_counter() - started], dtype=torch.float64)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
