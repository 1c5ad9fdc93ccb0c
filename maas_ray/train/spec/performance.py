"""Settings for speed and memory that do not change the training. Independent of model and layout."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from maas_ray.spec import Spec

ActivationCheckpointing = Literal["none", "selective", "full"]


class ProfileSpec(Spec):
    """Steps that torch's profiler records: one Chrome trace per worker, in `profile/` of the run.

    Open it with chrome://tracing or https://ui.perfetto.dev.
    """

    first_step: PositiveInt = 10
    """First recorded optimizer step, counted from 1; the first steps of a run are not typical."""
    steps: int = Field(default=3, ge=1, le=20)
    """Number of recorded steps; a trace has some MB per step."""


class PerformanceSpec(Spec):
    """Speed and memory of the same training. Every field can change when a run is resumed."""

    activation_checkpointing: ActivationCheckpointing = "none"
    """Activations that the backward pass recomputes, block by block, instead of keeping them from the forward pass.
    `full`: all of a block, for about a third more time; `selective`: all except matrix products, convolutions and
    attention, which take most of the time."""
    compile: bool = False
    """Compiles each block (`torch.compile`). The first step takes a minute longer; workers need a C++ compiler. Results
    differ in the last bits from those of an uncompiled run."""
    prefetch: NonNegativeInt | None = None
    """Number of steps whose rows a thread reads ahead, into pinned memory with a GPU; 0: rows are read when needed.
    None: 2 with a GPU, 0 without: reading takes some 0.1 ms of a step, and a thread would compete for CPU time."""
    profile: ProfileSpec | None = None
    """Profiler settings; None: no profile."""
    peak_tflops: PositiveFloat | None = None
    """Peak performance of a worker's device in 1e12 floating-point operations per second, for the model FLOPs
    utilization (`train/mfu`). None: known for common GPUs; for other devices the utilization is not logged."""

    @model_validator(mode="after")
    def _one_who_chooses(self) -> Self:
        if self.compile and self.activation_checkpointing == "selective":
            raise ValueError(
                "compile does not support activation_checkpointing selective, because the compiler itself chooses what "
                "to recompute; use none or full"
            )
        return self
