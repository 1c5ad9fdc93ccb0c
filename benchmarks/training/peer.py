"""Runs a peer's program and reads the times it wrote. Knows no section."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from benchmarks.training.ours import COMMAND_TIMEOUT_S, Job, Timed
from maas_ray.train.spec.train import TrainSpec

ROOT = Path(__file__).parents[2]


def run(argv: list[str], out: Path, env: Mapping[str, str] | None = None, threads: int = 1) -> Timed:
    """Runs a program that writes `{done: {step: time}, …}` to `out`.

    Raises:
        RuntimeError: it failed; the message has the end of what it said.
    """
    out.unlink(missing_ok=True)
    started = time.time()
    finished = subprocess.run(
        argv,
        env={**(env or os.environ), "OMP_NUM_THREADS": str(threads)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=COMMAND_TIMEOUT_S,
    )
    ended = time.time()
    if finished.returncode or not out.exists():
        raise RuntimeError(f"{' '.join(argv[:6])}: {finished.stderr[-2000:]}")
    result = json.loads(out.read_text())
    return Timed(started, {int(step): when for step, when in result["done"].items()}, ended, result)


def write_spec(directory: Path, spec: TrainSpec) -> Path:
    """The spec as a peer reads it."""
    path = directory / "peer.json"
    path.write_text(spec.model_dump_json())
    return path


def plain(directory: Path, job: Job, digest: str, *, is_sharded: bool = False) -> Timed:
    """The plain script under torchrun, on this machine."""
    return _torchrun(directory, "plain", job, digest, ["--fsdp"] if is_sharded else [])


def titan_order(directory: Path, job: Job, digest: str) -> Timed:
    """The script in torchtitan's order under torchrun, on this machine."""
    return _torchrun(directory, "titan_order", job, digest, [])


def _torchrun(directory: Path, name: str, job: Job, digest: str, further: list[str]) -> Timed:
    out = directory / f"{name}.json"
    workers = job.spec.workers
    argv = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers.count)]
    argv += ["-m", f"benchmarks.training.peers.{name}", "--spec", str(write_spec(directory, job.spec))]
    argv += ["--digest", digest, "--out", str(out), *further]
    return run(argv, out, threads=workers.cpus)


def bare_ray(directory: Path, job: Job, digest: str, env: Mapping[str, str]) -> Timed:
    """Bare Ray Train in the cluster of `env`."""
    out = directory / "bare.json"
    argv = [sys.executable, "-m", "benchmarks.training.peers.bare_ray", "--spec", str(write_spec(directory, job.spec))]
    return run([*argv, "--digest", digest, "--out", str(out)], out, env=env)


def characters(directory: Path, text: Path, *, steps: int, threads: int, seed: int) -> Timed:
    """The language model in one file."""
    out = directory / "characters.json"
    argv = [sys.executable, str(ROOT / "benchmarks/training/peers/characters.py"), "--text", str(text)]
    argv += ["--out", str(out), "--steps", str(steps), "--threads", str(threads), "--seed", str(seed)]
    return run(argv, out, threads=threads)
