"""How a call ended in another pool. Knows no server."""

from typing import NamedTuple

from maas_ray.errors import MaasError


class CallOutcome(NamedTuple):
    """The answer of another pool, or its status."""

    body: bytes
    code: int
    """Of gRPC; 0: it succeeded."""
    details: str
    trailing: tuple[tuple[str, str | bytes], ...]


class Refused(MaasError):
    """Another pool refused a call.

    Args:
        outcome: with its status.
    """

    def __init__(self, outcome: CallOutcome) -> None:
        super().__init__(outcome.details)
        self.outcome = outcome
