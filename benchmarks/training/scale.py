"""A table of many gigabytes: prepared by tasks, trained from by two ranks; the memory of every process while that runs.

The data are random numbers with a rule that a network can learn, in many parquet files. Memory is what the system says
of each process three times per second: `rss` with the
pages that it shares (mapped files, Ray's object store), `uss` without them, `pss` with its part of them.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from benchmarks.training import ours
from maas_ray.cluster import load_state

NUM_NUMBERS = 60
CITIES = np.array(["Rome", "Oslo", "Lima", "Kyiv", "Cairo", "Quito", "Delhi", "Accra"])
FILE_BYTES = 80_000_000
MAX_TWICE = 1.0
"""Gigabytes that are prepared a second time, to compare the digests."""
_ROW_BYTES = NUM_NUMBERS * 4 + 8
_EVERY_S = 0.3
_MARK = "MAAS_RAY_BENCHMARK_WATCHES"


def write_files(folder: Path, gigabytes: float, seed: int = 0) -> int:
    """Writes the files; returns their bytes."""
    folder.mkdir(parents=True)
    num_files = max(1, round(gigabytes * 1e9 / FILE_BYTES))
    num_rows = int(min(gigabytes * 1e9, FILE_BYTES) / _ROW_BYTES)
    weights = np.random.default_rng(seed).normal(size=NUM_NUMBERS).astype(np.float32)
    for number in range(num_files):
        rng = np.random.default_rng([seed, number])
        numbers = rng.standard_normal((num_rows, NUM_NUMBERS), dtype=np.float32)
        cities = rng.integers(0, len(CITIES), num_rows)
        label = (numbers @ weights + cities - 3.5 > 0).astype(np.int64)
        numbers[rng.random(num_rows) < 0.01, 0] = np.nan
        columns = {f"x{i}": pa.array(numbers[:, i]) for i in range(NUM_NUMBERS)}
        codes = pa.array(cities.astype(np.int8), mask=rng.random(num_rows) < 0.005)
        columns["city"] = pa.DictionaryArray.from_arrays(codes, pa.array(CITIES.tolist())).cast(pa.string())
        table = pa.table({**columns, "label": label})
        plain = ["city", "label"]
        parquet.write_table(
            table, folder / f"{number:04d}.parquet", row_group_size=1 << 16, compression="none", use_dictionary=plain
        )
    return sum(path.stat().st_size for path in folder.iterdir())


def job_fields(uri: Path, steps: int) -> dict[str, Any]:
    """An mlp on two ranks."""
    return {
        "model": {"name": "mlp", "params": {"size": 2}},
        "data": {
            "uri": str(uri),
            "task": "binary",
            "target": "label",
            "split": {"validation": 0.02, "test": 0.02},
            "cleaning": {
                "columns": {"x0": {"missing": "median"}, "city": {"missing": "most_frequent"}},
            },
        },
        "optimizer": {"name": "adamw", "lr": 0.001},
        "batch": {"global_size": 512},
        "steps": steps,
        "log_every": max(1, steps // 10),
        "workers": {"count": 2},
        "checkpoint": {"every_steps": steps},
    }


@dataclass
class Watch:
    """The largest memory of each kind of process, in bytes, and that of the ranks over time."""

    peaks: dict[str, dict[str, int]] = field(default_factory=dict)
    ranks: list[tuple[float, int, int]] = field(default_factory=list)
    """Seconds since 1970, and the largest `rss` and `uss` of a rank then."""

    def look(self, cluster_id: str) -> None:
        """Asks the system once."""
        now, ranks = time.time(), []
        for kind, sizes in _processes(cluster_id):
            peak = self.peaks.setdefault(kind, {})
            for name, size in sizes.items():
                peak[name] = max(peak.get(name, 0), size)
            if kind == "rank":
                ranks.append((sizes["rss"], sizes["uss"]))
        if ranks:
            self.ranks.append((now, max(rss for rss, _ in ranks), max(uss for _, uss in ranks)))


@contextmanager
def watching(home: Path) -> Iterator[Watch]:
    """Watches the cluster's processes, and this one's own children that joined it."""
    state = load_state(home)
    if state is None:
        raise RuntimeError(f"no cluster is recorded in {home}")
    watch, done = Watch(), threading.Event()

    def loop() -> None:
        while not done.wait(_EVERY_S):
            watch.look(state.cluster_id)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    os.environ[_MARK] = state.cluster_id  # drivers are not started by the cluster, and inherit it from here
    try:
        yield watch
    finally:
        del os.environ[_MARK]
        done.set()
        thread.join(timeout=10)


def _processes(cluster_id: str) -> Iterator[tuple[str, dict[str, int]]]:
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            if cluster_id.encode() not in (folder / "environ").read_bytes():
                continue
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            lines = (folder / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue  # it has ended
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.endswith("kB")}
        if kind := _kind(command):
            own = kilobytes["Private_Clean"] + kilobytes["Private_Dirty"]
            yield kind, {"rss": kilobytes["Rss"] << 10, "pss": kilobytes["Pss"] << 10, "uss": own << 10}


def _kind(command: str) -> str | None:
    """What a process is, by its title; None: one of the cluster's own."""
    if "ReadRange" in command or "MapBatches" in command:
        return "task"
    if "RayTrainWorker" in command:
        return "rank"
    return "driver" if "benchmarks.training.scale" in command or "maas-ray train" in command else None


def measure(directory: Path, home: Path, gigabytes: float, steps: int) -> dict[str, Any]:
    """Prepares and trains; everything it wrote is removed."""
    folder = directory / "scale"
    try:
        size = write_files(folder / "files", gigabytes)
        job = ours.write_job(directory, "scale", job_fields(folder / "files", steps))
        found: dict[str, Any] = {"bytes": size, "files": len(list((folder / "files").iterdir())), "steps": steps}
        with watching(home) as watch:
            found["prepared"] = _child(home, "prepare", str(job.path))
            found["preparing"] = watch.peaks
        found["noted"] = _child(home, "prepare", str(job.path))
        if gigabytes <= MAX_TWICE:  # into another store, where nothing is noted
            found["again"] = _child(home, "prepare", str(job.path), str(folder / "store"))
        found["read"] = _child(home, "read", str(job.path), found["prepared"]["digest"])
        with watching(home) as watch:
            run = ours.train(job, home, "scale-0")
            found["training"] = watch.peaks
        found["metrics"] = run.result["metrics"]
        found["first_step_s"] = min(run.done.values()) - run.started
        inside = [one for one in watch.ranks if min(run.done.values()) <= one[0] <= max(run.done.values())]
        found["rank_rss"] = [rss for _, rss, _ in inside]
        found["rank_uss"] = [uss for _, _, uss in inside]
        found["steps_per_s"] = 1 / run.step_s(job.spec.log_every)
        return found
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _child(home: Path, *arguments: str) -> dict[str, Any]:
    """This file as a program that has joined the cluster."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.training.scale", *arguments],
        env=ours.environment(home),
        capture_output=True,
        text=True,
        timeout=ours.COMMAND_TIMEOUT_S,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _prepare(spec_path: str, store: str = "") -> Mapping[str, Any]:
    import ray

    from maas_ray.data.prepare import prepare
    from maas_ray.spec import load_spec
    from maas_ray.store.objects import open_store
    from maas_ray.train.spec.train import TrainSpec

    ray.init(log_to_driver=False)
    spec = load_spec(TrainSpec, spec_path)
    start = time.perf_counter()
    dataset = prepare(spec.data, open_store(store or spec.storage))
    seconds = time.perf_counter() - start
    return {"digest": dataset.digest, "seconds": seconds, "num_rows": dataset.num_rows, "report": dataset.report}


def _read(spec_path: str, digest: str) -> Mapping[str, Any]:
    """Rows per second of one reader in the order of training: first while shards are verified, then without."""
    from maas_ray.data.loading.loader import Loader
    from maas_ray.data.loading.open import open_rows
    from maas_ray.data.stored.dataset import open_dataset
    from maas_ray.spec import load_spec
    from maas_ray.store.objects import open_store
    from maas_ray.train.spec.train import TrainSpec

    spec = load_spec(TrainSpec, spec_path)
    dataset = open_dataset(open_store(spec.storage), digest)
    loader = Loader.over(open_rows(dataset, "train"), seed=0, global_batch=512, rank=0, world=1)
    result: dict[str, Any] = {}
    cursor = 0
    for name, batches in (("first_s", 50), ("warm_s", 50), ("steady", 400)):
        start = time.perf_counter()
        for _ in range(batches):
            loader.load(cursor, 1 << 60)
            cursor += 512
        took = time.perf_counter() - start
        result[name] = took if name != "steady" else batches * 512 / took
    return result


if __name__ == "__main__":
    role, *rest = sys.argv[1:]
    print(json.dumps(_prepare(*rest) if role == "prepare" else _read(*rest)))
