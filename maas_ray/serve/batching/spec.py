"""Batching spec: limits of merging and queueing in a pool, and the byte budget shared by all queues of a replica."""

from pydantic import Field, NonNegativeFloat, PositiveInt

from maas_ray.errors import Overloaded
from maas_ray.spec import Spec


class BatchSpec(Spec):
    """How rows are merged, and how many requests may wait."""

    max_batch_size: PositiveInt = 64
    """Maximum rows of one run. A single request with more rows runs alone."""
    max_delay_ms: NonNegativeFloat = 0.0
    """Milliseconds that a request may wait for others to fill its run although the engine is idle. 0: no delay."""
    max_queued_requests: PositiveInt = 512
    """Maximum number of waiting requests of one model version; further ones get status 503 immediately."""
    max_queued_bytes: PositiveInt = 256 << 20
    """Maximum bytes of waiting requests in one replica, over all its models, including bodies that are being received;
    these may use three quarters of it, so that there is room for small requests."""
    instances: PositiveInt | None = None
    """Concurrent runs of one model version. None: 1 on CPUs and with CUDA graphs, 2 on a GPU."""
    cuda_graph_rows: tuple[PositiveInt, ...] = ()
    """Batch sizes that are captured as CUDA graphs, on a GPU; smaller batches are padded to the next size. Not tested
    on a GPU yet."""
    check_share: NonNegativeFloat = Field(default=0.001, le=1.0)
    """Share of the merged requests that are run again alone, while the engine is idle, and compared. A difference ends
    merging for that version. 0: no checks."""


SMALL_BYTES = 64 << 10
"""A body of at most this size is accepted as long as there is any room."""


class ByteBudget:
    """Bytes of waiting requests, shared by all queues of a replica.

    Args:
        limit: maximum bytes of waiting requests.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.arriving = 0
        """Declared bytes of bodies that are being received; included in `used`."""

    def expect(self, num_bytes: int, size: int) -> None:
        """Reserves bytes for a body, or a part of one, before it is received; `arrived` releases them.

        Args:
            num_bytes: bytes of the part.
            size: bytes of the whole body, as far as known; a small one may use the last quarter.

        Raises:
            Overloaded: there is no room; nothing was reserved. A body that arrives alone only has to fit.
        """
        room = self.limit - self.used
        if self.arriving and size > SMALL_BYTES:
            room = min(room, self.limit * 3 // 4 - self.arriving)
        if num_bytes > room:
            raise Overloaded(
                f"{self.arriving} bytes of bodies are being received and {self.used - self.arriving} bytes wait; this "
                f"body of {size} bytes exceeds the limit of {self.limit} (batching.max_queued_bytes); retry later"
            )
        self.used += num_bytes
        self.arriving += num_bytes

    def arrived(self, num_bytes: int) -> None:
        """Releases bytes that `expect` reserved: the body was received, or will not be."""
        self.used -= num_bytes
        self.arriving -= num_bytes
