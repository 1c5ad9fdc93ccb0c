"""Trains a run.

ray job submit --working-dir . -- python jobs/train.py --spec jobs/specs/digits.yaml --set storage.uri=s3://bucket/maas
"""

import argparse
import json
import sys
from dataclasses import asdict

from maas_ray.cluster import connect
from maas_ray.errors import MaasError
from maas_ray.spec import load_spec


def main() -> int:
    """Prints the result as one JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help="YAML file with a TrainSpec")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="overrides one field of the spec")
    parser.add_argument("--resume", action="store_true", help="continue a run that exists")
    arguments = parser.parse_args()
    try:
        connect()
        from maas_ray.train.run import run_training
        from maas_ray.train.spec import TrainSpec

        spec = load_spec(TrainSpec, arguments.spec, arguments.set)
        result = run_training(
            spec, resume=arguments.resume, on_progress=lambda progress: print(progress, file=sys.stderr)
        )
    except MaasError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
