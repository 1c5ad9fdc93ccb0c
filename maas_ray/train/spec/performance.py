"""What makes training faster or smaller without changing what is trained. Knows no model and no layout."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maas_ray.spec import Spec

ActivationCheckpointing = Literal["none", "selective", "full"]


class ProfileSpec(Spec):
    """Which steps are recorded by torch's profiler: one Chrome trace per worker, below the run's `profile/`.

    For chrome://tracing or https://ui.perfetto.dev.
    """

    first_step: PositiveInt = 10
    """The first optimizer step that is recorded, counted from 1; the very first ones are not typical."""
    steps: int = Field(default=3, ge=1, le=20)
    """How many are recorded; a trace takes some MB per step."""


class PerformanceSpec(Spec):
    """How fast the same training runs, and in how much memory. All of it may change when a run is resumed."""

    activation_checkpointing: ActivationCheckpointing = "none"
    """What is computed again in the backward pass, block by block, instead of being kept from the forward pass. `full`:
    all of a block, for about a third more time; `selective`: all but matrix products, convolutions and attention, which
    take most of the time."""
    compile: bool = False
    """Compiles each block (`torch.compile`). The first step takes a minute more; workers need a C++ compiler. Results
    differ in the last bits from those of a run that is not compiled."""
    prefetch: NonNegativeInt | None = None
    """Steps whose rows are read ahead by a thread, into pinned memory with a GPU; 0: read when they are needed. None: 2
    with a GPU, and 0 without: reading takes some 0.1 ms of a step, and a thread would take CPU time from computing."""
    profile: ProfileSpec | None = None
    """None: nothing is recorded."""
    peak_tflops: PositiveFloat | None = None
    """What a worker's device could do at best, in 1e12 floating-point operations per second, for the share of it that is
    used (`train/mfu`). None: known for common GPUs; without it no such share is logged."""

    @model_validator(mode="after")
    def _one_who_chooses(self) -> Self:
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "a compiled block chooses itself what to compute again between matrix products; use "
                "activation_checkpointing none or full with compile"
            )
        return self
