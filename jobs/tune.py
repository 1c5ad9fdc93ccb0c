"""Searches for the best values of fields of a training spec; the result contains them as `best_spec`.

ray job submit --working-dir . -- python jobs/tune.py --spec jobs/specs/digits-search.yaml \
    --set base.storage.uri=s3://bucket/maas
"""

import sys
from dataclasses import asdict
from typing import Any

from maas_ray.console.job import Asked, answer_job, run_job


def tune(asked: Asked) -> tuple[dict[str, Any], int]:
    """Returns the fields of `SearchResult`, and exit code 1 if trials are unfinished or none of them has a metric."""
    # Imported late: Ray's libraries read the cluster's environment at import.
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
