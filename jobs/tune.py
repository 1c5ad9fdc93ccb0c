"""Searches for the best values of some fields of a training spec.

ray job submit --working-dir . -- python jobs/tune.py --spec jobs/specs/digits-search.yaml --set trials=20
"""

import argparse
import json
import sys
from dataclasses import asdict

from maas_ray.cluster import connect
from maas_ray.errors import MaasError


def main() -> int:
    """Prints the result as one JSON line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spec", required=True, help="YAML file with a TuneSpec")
    parser.add_argument("--set", action="append", default=[], metavar="a.b=c", help="overrides one field of the spec")
    parser.add_argument("--resume", action="store_true", help="go on with a search that exists")
    arguments = parser.parse_args()
    try:
        connect()
        from maas_ray.train.search.run import run_search
        from maas_ray.train.search.spec import load_tune_spec

        spec = load_tune_spec(arguments.spec, arguments.set)
        result = run_search(
            spec,
            resume=arguments.resume,
            on_event=lambda trial, event: print(f"trial {trial}: {event}", file=sys.stderr),
        )
    except MaasError as error:
        print(f"error[{error.code}]: {error}", file=sys.stderr)
        return 1
    print(json.dumps(asdict(result)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
