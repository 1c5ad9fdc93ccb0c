"""Exports a run's checkpoint behind the parity gate and publishes it as the next version of a model.

ray job submit --working-dir . -- python jobs/publish.py --store s3://bucket/maas --run digits --name digits --promote
"""

import argparse
import json
import sys

import ray

from maas_ray.cluster import connect
from maas_ray.errors import MaasError
from maas_ray.registry.models import PRODUCTION, Registry
from maas_ray.store.objects import StorageSpec, open_store

TIMEOUT_S = 3600


def main() -> int:
    """Prints the version as one JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", required=True, help="URI of the store")
    parser.add_argument("--endpoint", help="URL of an S3-compatible service other than AWS")
    parser.add_argument("--run", required=True)
    parser.add_argument("--name", required=True, help="the model to publish a version of")
    parser.add_argument("--step", type=int, help="the checkpoint; by default what the spec says in checkpoint.use")
    parser.add_argument("--promote", nargs="?", const=PRODUCTION, metavar="ALIAS", help="also point an alias at it")
    arguments = parser.parse_args()
    try:
        connect()
        from maas_ray.optimize.publish import export_run

        storage = StorageSpec(uri=arguments.store, endpoint=arguments.endpoint)
        store = open_store(storage)
        storage = storage.model_copy(update={"uri": store.uri})
        task = ray.remote(num_cpus=1)(lambda: export_run(open_store(storage), arguments.run, arguments.step))
        exported = ray.get(task.remote(), timeout=TIMEOUT_S)
        registry = Registry(store)
        version = registry.publish(arguments.name, exported.bundle_id)
        if arguments.promote:
            registry.promote(arguments.name, version.version, arguments.promote)
    except MaasError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return 1
    report = {"model": version.model, "version": version.version, "bundle": version.bundle, "run": version.run}
    print(json.dumps({**report, "parity": exported.info.parity, "metrics": exported.info.metrics}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
