"""Training: specs, the loop in plain torch, parallelism, and runs on Ray Train. `maas_ray.train(spec)` trains a run."""

from maas_ray.process.callable_package import make_callable

make_callable(__name__, "maas_ray.api.runs:train")
