"""What TensorBoard shows of a run, as its spec says it."""

from pydantic import Field, PositiveInt

from maas_ray.spec import Spec


class TensorboardSpec(Spec):
    """What TensorBoard shows beside the metrics."""

    histograms_every: PositiveInt | None = None
    """Logged steps between histograms of weights and gradients; None: none. Of what is sharded or staged, those are shown
    that rank 0 holds: nothing is gathered for them."""
    samples: int = Field(default=0, ge=0, le=64)
    """Rows of the validation split whose predictions are shown at each validation, always the first ones. A language
    model goes on with each from its middle, which takes up to 32 runs of it."""
