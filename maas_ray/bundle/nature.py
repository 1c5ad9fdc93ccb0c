"""The result of a version's first load, so that later loads of the same bytes need not determine it again."""

from dataclasses import dataclass

from maas_ray.bundle.format import Signature
from maas_ray.bundle.graph.hazards import Hazards


@dataclass(frozen=True)
class Nature:
    """Properties of a version that were determined by loading it."""

    hazards: Hazards
    not_merged_because: str
    """Reason why rows of different requests do not share a run; empty if they do."""
    providers: tuple[str, ...]
    signature: Signature
    warmed_with: str
    """Name of the values of its warm-up; empty: it rejects all tried values."""
    not_padded_because: str = ""
    """Reason why requests of different sizes do not share a run, if the signature states a padded dimension."""
    killed_by: tuple[str, ...] = ()
    """Names of synthetic values that killed the process."""
