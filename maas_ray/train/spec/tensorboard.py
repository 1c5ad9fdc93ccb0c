"""The spec of a run's TensorBoard logs."""

from pydantic import Field, PositiveInt

from maas_ray.spec import Spec


class TensorboardSpec(Spec):
    """TensorBoard logs in addition to the metrics."""

    histograms_every: PositiveInt | None = None
    """Logged steps between histograms of weights and gradients; None: no histograms. Of a sharded or staged model only
    the part of rank 0 is logged: nothing is gathered."""
    samples: int = Field(default=0, ge=0, le=64)
    """Number of rows of the validation split whose predictions are logged at each validation, always the first ones. A
    language model continues each row from its middle, which takes up to 32 inferences."""
