"""Searches for the best values of some fields of a training spec; the answer holds them as `best_spec`.

ray job submit --working-dir . -- python jobs/tune.py --spec jobs/specs/digits-search.yaml \
    --set base.storage.uri=s3://bucket/maas
"""

import sys
from dataclasses import asdict
from typing import Any

from maas_ray.console.job import Asked, answer_job, run_job


def tune(asked: Asked) -> tuple[dict[str, Any], int]:
    """The result, see `SearchResult`; the exit code is 1 if the search is not over, or none of its trials has a metric."""
    # Only now: Ray reads the cluster's environment when its libraries are imported.
    from maas_ray.train.search.run import describe, run_search
    from maas_ray.train.search.spec import load_tune_spec

    spec = load_tune_spec(asked.spec, asked.overrides)
    result = run_search(
        spec,
        resume=asked.resume,
        on_event=lambda trial, event: print(describe(spec, trial, event), file=sys.stderr),
    )
    return asdict(result), int(not result.is_complete)


if __name__ == "__main__":
    sys.exit(run_job(lambda: answer_job(__doc__, "TuneSpec", tune)))
