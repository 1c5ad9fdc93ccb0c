"""Measures how long commands take on a store with long lists, with a pause before each answer as from far away.

    python -m benchmarks.store --directory /tmp/long          10,000 versions, 1,000 models, 5,000 runs, 500 checkpoints
    python -m benchmarks.store --directory /tmp/long --versions 100000

Fills the directory first, unless it is filled. A new process of this library's commands would add its start.
"""

import argparse
import datetime
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.serving.peers import machine
from benchmarks.store.filling import Sizes, fill
from benchmarks.store.slow import SlowStore
from maas_ray.checkpoint.catalog import describe
from maas_ray.registry.models import Registry
from maas_ray.serve.models.desired_state import DesiredState
from maas_ray.serve.models.references import resolve_all
from maas_ray.serve.spec.pools import ServedModelSpec
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.records.runs import Runs

CHECKPOINTS = "runs/run-00000/checkpoints"
LISTED = [ServedModelSpec(name=f"model-{number}", alias="production") for number in range(300)]


def main() -> None:
    """The command."""
    options = _options()
    store = open_store(str(options.directory))
    if not Registry(store).models():
        began = time.perf_counter()
        fill(store, Sizes(options.versions, options.models, options.runs, options.checkpoints, options.runs // 10))
        print(f"filled in {time.perf_counter() - began:.0f} s")
    bundle = Registry(store).resolve("model-0").bundle
    on = machine()
    print(f"{on['cpus']} CPUs ({on['cpu']}), Python {on['python']}, {datetime.datetime.now(datetime.UTC):%Y-%m-%d}.\n")
    print("| command | gets | listings | median, s | CPU, s |\n|---|---|---|---|---|")
    for name, work in _commands(bundle).items():
        slow = SlowStore(store, options.get_ms / 1000, options.get_ms / 1000)
        walls, cpus = [], []
        for number in range(options.repeats):
            slow.taken()
            wall, cpu = time.perf_counter(), time.process_time()
            work(slow, number)
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
        counts = slow.taken()
        print(
            f"| {name} | {counts.gets} | {counts.lists} | {statistics.median(walls):.2f} | "
            f"{statistics.median(cpus):.2f} |"
        )


def _commands(bundle: str) -> dict[str, Callable[[ObstoreStore, int], object]]:
    now = time.time_ns()
    return {
        "models": lambda store, number: Registry(store).models(),
        "promote": lambda store, number: Registry(store).promote("model-7", 1 + number % 2, f"alias-{now}"),
        "publish": lambda store, number: Registry(store).publish("model-7", bundle, token=f"{now}-{number}"),
        "runs": lambda store, number: Runs(store).survey(),
        "a replica's first look, 300 models listed": lambda store, number: (
            resolve_all(Registry(store), LISTED),
            DesiredState(store, "pool").models(),
        ),
        "checkpoints list": lambda store, number: describe(store, CHECKPOINTS),
    }


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.store", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="of the store; kept")
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--checkpoints", type=int, default=500)
    parser.add_argument("--get-ms", type=float, default=5.0, help="pause before each get and each page of a listing")
    parser.add_argument("--repeats", type=int, default=5)
    return parser.parse_args()


if __name__ == "__main__":
    main()
