"""What the first load of a version taught: a second load of the same bytes need not find it out again. Runs nothing."""

from dataclasses import dataclass

from maas_ray.bundle.format import Signature
from maas_ray.bundle.graph.hazards import Hazards


@dataclass(frozen=True)
class Nature:
    """What was learned of a version by loading it."""

    hazards: Hazards
    not_merged_because: str
    """Why rows of different requests do not share a run; empty where they do."""
    providers: tuple[str, ...]
    signature: Signature
    warmed_with: str
    """Name of the values of its warm-up; empty: it refuses all that were tried."""
    not_padded_because: str = ""
    """Why requests of different sizes do not, where the signature states a dimension for it."""
    killed_by: tuple[str, ...] = ()
    """Names of made-up values that killed the process."""
