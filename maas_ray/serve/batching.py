"""How rows are merged and how many may wait: what a pool's spec says, and the bytes that all its queues share."""

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from maas_ray.spec import Spec


class BatchSpec(Spec):
    """How rows are merged, and how many may wait."""

    max_batch_size: PositiveInt = 64
    """Most rows of one run. A single request with more rows runs alone."""
    max_delay_ms: NonNegativeFloat = 0.0
    """Milliseconds that a request may wait for others to fill its run although the engine is free. 0: never."""
    max_queued_requests: PositiveInt = 512
    """Requests of one model version that may wait; one more is answered 503 at once."""
    max_queued_bytes: PositiveInt = 256 << 20
    """Bytes of requests that may wait in one replica, over all its models."""
    streams: PositiveInt | None = None
    """Runs of one model version at the same time. None: 1 on CPUs and with CUDA graphs, 2 on a GPU."""
    cuda_graph_rows: tuple[PositiveInt, ...] = ()
    """Sizes of runs that are captured as CUDA graphs, on a GPU; smaller batches are padded up to the next. Not run on a
    GPU yet."""
    check_share: NonNegativeFloat = Field(default=0.001, le=1.0)
    """Share of the requests that shared a run which are run again alone, while the engine is idle, and compared. A
    difference ends the merging of that version. 0: none."""
    tenant_weights: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Shares of tenants that do not weigh 1: rows run while several wait are in proportion."""


class ByteBudget:
    """Bytes of waiting requests, shared by all queues of a replica.

    Args:
        limit: most bytes that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
