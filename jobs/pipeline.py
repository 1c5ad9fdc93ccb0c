"""Runs the complete pipeline on one machine, from data to predictions over HTTP (maas_ray/quickstart/pipeline.py).

python jobs/pipeline.py --keep
"""

import sys

from maas_ray.console.job import run_job
from maas_ray.quickstart.pipeline import main

if __name__ == "__main__":
    sys.exit(run_job(main))
