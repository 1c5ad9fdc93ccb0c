"""Evaluates a run's checkpoint on held-out data, in a task on the cluster.

ray job submit --working-dir . -- python jobs/evaluate.py --store s3://bucket/maas --run digits
"""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

import ray

from maas_ray.cluster import connect
from maas_ray.console.job import refuse, run_job
from maas_ray.console.leaving import leaves
from maas_ray.errors import MaasError
from maas_ray.store.objects import StorageSpec, open_store

TIMEOUT_S = 3600


def evaluate(storage: StorageSpec, run: str, split: str, step: int | None) -> dict[str, Any]:
    """Returns the metrics as plain values, so that the driver needs no torch."""
    from maas_ray.train.validation.evaluate_run import evaluate_run

    return asdict(evaluate_run(open_store(storage), run, split, step))


def main() -> int:
    """Prints the metrics as one JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="URI of the store")
    parser.add_argument("--endpoint", help="URL of an S3-compatible service other than AWS")
    parser.add_argument("--run", required=True, help="id of the run")
    parser.add_argument("--split", default="test", choices=["train", "validation", "test"])
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the spec's checkpoint.use")
    arguments = parser.parse_args()
    leaves("nothing was changed; submit the job again")
    try:
        connect()
        storage = StorageSpec(uri=arguments.store, endpoint=arguments.endpoint)
        storage = storage.model_copy(update={"uri": open_store(storage).uri})
        # In a task, not in this driver: the driver of a job runs on the head node, which offers no CPUs.
        task = ray.remote(num_cpus=1)(evaluate)
        evaluation = ray.get(task.remote(storage, arguments.run, arguments.split, arguments.step), timeout=TIMEOUT_S)
    except MaasError as error:
        return refuse(error)
    print(json.dumps(evaluation))
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
