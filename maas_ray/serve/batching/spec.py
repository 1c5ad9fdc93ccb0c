"""How rows are merged and how many may wait: what a pool's spec says, and the bytes that all its queues share."""

from pydantic import Field, NonNegativeFloat, PositiveInt

from maas_ray.errors import Overloaded
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
    """Bytes of requests that may wait in one replica, over all its models, bodies on their way included; these may take
    three quarters of it, so that small requests still find a place."""
    instances: PositiveInt | None = None
    """Runs of one model version at the same time. None: 1 on CPUs and with CUDA graphs, 2 on a GPU."""
    cuda_graph_rows: tuple[PositiveInt, ...] = ()
    """Sizes of runs that are captured as CUDA graphs, on a GPU; smaller batches are padded up to the next. Not run on a
    GPU yet."""
    check_share: NonNegativeFloat = Field(default=0.001, le=1.0)
    """Share of the requests that shared a run which are run again alone, while the engine is idle, and compared. A
    difference ends the merging of that version. 0: none."""


SMALL_BYTES = 64 << 10
"""A body of at most so many bytes is let in as long as there is any room."""


class ByteBudget:
    """Bytes of waiting requests, shared by all queues of a replica.

    Args:
        limit: most bytes that may wait.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.arriving = 0
        """Bytes of bodies on their way, as declared; they are in `used` as well."""

    def expect(self, num_bytes: int, size: int) -> None:
        """Counts a body, or a part of one, before it is received; `arrived` gives that back.

        Args:
            num_bytes: of the part.
            size: of the whole body, as far as it is known; a small one may use the last quarter.

        Raises:
            Overloaded: there is no room for it; nothing was counted. A body that arrives alone only has to fit.
        """
        room = self.limit - self.used
        if self.arriving and size > SMALL_BYTES:
            room = min(room, self.limit * 3 // 4 - self.arriving)
        if num_bytes > room:
            raise Overloaded(
                f"{self.arriving} bytes of bodies are on their way and {self.used - self.arriving} wait; this one of "
                f"{size} does not fit within {self.limit} (batching.max_queued_bytes); send it again later"
            )
        self.used += num_bytes
        self.arriving += num_bytes

    def arrived(self, num_bytes: int) -> None:
        """Gives back what `expect` has counted: the body has arrived, or will not."""
        self.used -= num_bytes
        self.arriving -= num_bytes
