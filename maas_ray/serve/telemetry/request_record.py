"""Record of a completed inference request, for the access log and tracing. Contains no tensor, and no header except
the request id and the trace's.
"""

from typing import NamedTuple, Protocol

from maas_ray.serve.telemetry.stats import Outcome


class RequestRecord(NamedTuple):
    """One inference request. Times are seconds; 0 for a phase that was not reached."""

    outcome: Outcome
    status: int
    """HTTP status; 499 if the client disconnected."""
    request_id: str
    """Request id as sent back, so validated: printable ASCII of bounded length."""
    total_s: float
    """End-to-end time."""
    tenant: str = "default"
    model: str = ""
    """Name from the registry; empty if the requested name does not exist."""
    version: int = 0
    run: str = ""
    """Training run of the version."""
    bytes_in: int = 0
    bytes_out: int = 0
    num_rows: int = 0
    read_s: float = 0.0
    """Parsing time, before the queue."""
    queue_s: float = 0.0
    compute_s: float = 0.0
    """Time of the whole run that the request was part of."""
    traceparent: bytes = b""
    """W3C Trace Context header, not validated; empty if there was none."""


class Observer(Protocol):
    """Receiver of request records: the access log, tracing."""

    def note(self, record: RequestRecord) -> None:
        """Called on the loop, once for each request; never blocks and never raises."""
        ...

    def close(self, timeout_s: float) -> None:
        """Writes buffered records, and ends the threads. Blocks for at most `timeout_s`: do not call it on the loop."""
        ...
