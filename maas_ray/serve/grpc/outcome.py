"""Outcome of a call to another pool. Independent of servers."""

from typing import NamedTuple

from maas_ray.errors import MaasError


class CallOutcome(NamedTuple):
    """Response or status of another pool."""

    body: bytes
    code: int
    """gRPC status code; 0: success."""
    details: str
    trailing: tuple[tuple[str, str | bytes], ...]


class Refused(MaasError):
    """Another pool refused a call.

    Args:
        outcome: outcome with its status.
    """

    def __init__(self, outcome: CallOutcome) -> None:
        super().__init__(outcome.details)
        self.outcome = outcome
