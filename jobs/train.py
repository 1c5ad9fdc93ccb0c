"""Trains a run.

ray job submit --working-dir . -- python jobs/train.py --spec jobs/specs/digits.yaml --set storage.uri=s3://bucket/maas
"""

import sys
from dataclasses import asdict
from typing import Any

from maas_ray.console.job import Asked, answer_job, run_job
from maas_ray.spec import load_spec


def train(asked: Asked) -> tuple[dict[str, Any], int]:
    """Returns the fields of `RunResult`."""
    # Imported late: Ray's libraries read the cluster's environment at import.
    from maas_ray.train.run import run_training
    from maas_ray.train.spec.train import TrainSpec

    spec = load_spec(TrainSpec, asked.spec, asked.overrides)
    result = run_training(
        spec,
        resume=asked.resume,
        extend=asked.extend,
        on_progress=lambda progress: print(progress, file=sys.stderr),
    )
    return asdict(result), 0


if __name__ == "__main__":
    sys.exit(run_job(lambda: answer_job(__doc__, "TrainSpec", train, can_extend=True)))
