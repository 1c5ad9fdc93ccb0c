"""Saving by itself: two ranks hold half of a model each. Run under torchrun; `measure_saving` starts it.

Figures per round: a save that is waited for, how long a step waits for one in the background, writing and fsyncing the
same number of random bytes on the same disk, and the bytes read to load the state cut in another way.
"""

import argparse
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

from maas_ray.checkpoint.catalog import open_checkpoint
from maas_ray.checkpoint.load import load_into
from maas_ray.checkpoint.save import Snapshot, save
from maas_ray.checkpoint.saver import Saver
from maas_ray.checkpoint.team import saving_group
from maas_ray.store.objects import StorageSpec, open_store

RANKS = 2
WIDTH = 1024
TIMEOUT_S = 900.0


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
    saver = Saver(store, "background", group=saving_group())
    found: dict[str, Any] = {"bytes": num_bytes, "rounds": []}
    for number in range(options.rounds + 1):
        raw = root / f"raw-{rank}-{number}"  # a new one, as a save writes: freeing an old one's blocks takes time
        disk = _timed(lambda: _write(raw, num_bytes // RANKS))  # noqa: B023
        snapshot = Snapshot(number, 0, tensors)
        waited = _timed(lambda: save(store, "waited", snapshot, group))  # noqa: B023
        stall = _timed(lambda: saver.save(snapshot))  # noqa: B023
        saver.wait(is_strict=True)
        if number:  # the first one pages buffers in
            found["rounds"].append({"disk_s": disk, "waited_s": waited, "stall_s": stall})
    saver.close()
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


def _write(path: Path, num_bytes: int) -> None:
    """As raw as it gets; the random bytes are drawn before the clock starts, for all rounds."""
    data = _RANDOM.setdefault(num_bytes, os.urandom(num_bytes))
    with path.open("wb", buffering=0) as file:
        view = memoryview(data)
        while view:
            view = view[file.write(view[: 8 << 20]) :]
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
