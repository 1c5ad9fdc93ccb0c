"""Exports a run's checkpoint, compares both in the parity gate and publishes the next version of a model.

ray job submit --working-dir . -- python jobs/publish.py --store s3://bucket/maas --run digits --name digits --promote
"""

import argparse
import json
import sys
from typing import Any

import ray

from maas_ray.cluster import connect
from maas_ray.console.job import refuse, run_job
from maas_ray.console.leaving import leaves, published
from maas_ray.errors import MaasError
from maas_ray.process.interrupts import held
from maas_ray.registry.models import PRODUCTION, Registry
from maas_ray.store.objects import StorageSpec, open_store

TIMEOUT_S = 3600


def export(storage: StorageSpec, run: str, step: int | None) -> tuple[str, dict[str, Any]]:
    """Returns the bundle's id, its parity report and metrics as plain values, so that the driver needs no torch."""
    from maas_ray.optimize.publish import export_run

    exported = export_run(open_store(storage), run, step)
    return exported.bundle_id, {"parity": exported.info.parity, "metrics": exported.info.metrics}


def main() -> int:
    """Prints the version as one JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="URI of the store")
    parser.add_argument("--endpoint", help="URL of an S3-compatible service other than AWS")
    parser.add_argument("--run", required=True, help="id of the run")
    parser.add_argument("--name", required=True, help="name of the model that gets the new version")
    parser.add_argument("--step", type=int, help="step of the checkpoint; default: the spec's checkpoint.use")
    parser.add_argument("--token", help="idempotency token; default: derived from model, bundle and run")
    parser.add_argument(
        "--promote", nargs="?", const=PRODUCTION, metavar="ALIAS", help="also point an alias at the new version"
    )
    arguments = parser.parse_args()
    leaves("nothing was published; submit the job again")
    try:
        connect()
        storage = StorageSpec(uri=arguments.store, endpoint=arguments.endpoint)
        store = open_store(storage)
        storage = storage.model_copy(update={"uri": store.uri})
        task = ray.remote(num_cpus=1)(export)
        bundle, proof = ray.get(task.remote(storage, arguments.run, arguments.step), timeout=TIMEOUT_S)
        registry = Registry(store)
        with held():  # a published version is always reported
            version = registry.publish(arguments.name, bundle, token=arguments.token)
            leaves(published(arguments.name, version.version, arguments.promote))
        if arguments.promote:
            with held():
                registry.promote(arguments.name, version.version, arguments.promote)
                leaves(published(arguments.name, version.version, None))
    except MaasError as error:
        return refuse(error)
    report = {"model": version.model, "version": version.version, "bundle": version.bundle, "run": version.run}
    print(json.dumps(report | proof))
    return 0


if __name__ == "__main__":
    sys.exit(run_job(main))
