"""Whether a run keeps an average of its weights. Apart from ema.py, because that imports what only workers need (2 s)."""

from pydantic import Field, NonNegativeInt

from maas_ray.spec import Spec


class EmaSpec(Spec):
    """An average of the weights over the last steps, used for validation and taken by `evaluate` and `publish`."""

    decay: float = Field(default=0.999, gt=0.0, lt=1.0)
    """After each step: `average = decay * average + (1 - decay) * weight`."""
    start_step: NonNegativeInt = 0
    """Until so many steps are done the average is the weights themselves."""
