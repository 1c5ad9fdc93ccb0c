"""What is known of an inference request once it has ended, for those who write it down. Holds no tensor and no header
but the request id and the trace's.
"""

from typing import NamedTuple, Protocol

from maas_ray.serve.telemetry.stats import Outcome


class RequestRecord(NamedTuple):
    """One inference request. Times are seconds; a part that was not reached took 0."""

    outcome: Outcome
    status: int
    """Of HTTP; 499 where the caller left."""
    request_id: str
    """As sent back, so checked: printable ASCII of bounded length."""
    total_s: float
    """End to end."""
    tenant: str = "default"
    model: str = ""
    """From the registry; empty where there is none of the name that was asked for."""
    version: int = 0
    run: str = ""
    """The training run that the version came from."""
    bytes_in: int = 0
    bytes_out: int = 0
    num_rows: int = 0
    read_s: float = 0.0
    """Parsing, before the queue."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    """The whole run that the request was part of."""
    traceparent: bytes = b""
    """The header of W3C Trace Context, unchecked; empty if there was none."""


class Observer(Protocol):
    """Who writes requests down: the access log, tracing."""

    def note(self, record: RequestRecord) -> None:
        """Called on the loop, once for each request; never blocks and never raises."""
        ...

    def close(self, timeout_s: float) -> None:
        """Writes what is buffered, and ends the threads. Blocks for at most `timeout_s`: not for the loop."""
        ...
