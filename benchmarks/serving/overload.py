"""More load than a server can serve, in an open loop: what it still answers in time, and how fast it refuses the rest."""

from collections.abc import Sequence
from typing import Any

from benchmarks.serving.load.client import Answer, make_request
from benchmarks.serving.load.closed import HOST
from benchmarks.serving.load.flood import open_loop
from benchmarks.serving.load.generator import closed
from benchmarks.serving.processes import Running
from benchmarks.serving.workloads import Request, is_right

FACTORS = (2, 10)
GOOD_WITHIN_S = 1.0
"""An answer counts if it comes this soon after its request was due; the callers ask for no more by `x-request-timeout-ms`."""
PEAK_CLIENTS = 64
WARM_S = 1.0
"""Load before answers count, at the peak and above it: counted from an idle engine on, the run that the end cuts off
would be missing, which is a twentieth of the answers in 4 s where a run takes 0.2 s."""


def one_round(server: Running, requests: Sequence[Request], seconds: float) -> dict[str, Any]:
    """The peak in a closed loop, then the goodput at each factor times the peak.

    Returns:
        `peak_per_s`, and per factor the figures of `Tally.figures`.
    """
    more = {"x-request-timeout-ms": str(int(GOOD_WITHIN_S * 1000))}
    sent = [make_request(HOST, server.port, server.path, one.body, one.header_length, more) for one in requests]

    def check(index: int, answer: Answer) -> bool:
        return is_right(requests[index], answer.status, answer.body, answer.header_length)

    peak = closed(HOST, server.port, sent, check, clients=PEAK_CLIENTS, seconds=seconds, warm_s=WARM_S).figures(
        GOOD_WITHIN_S
    )
    found: dict[str, Any] = {"peak_per_s": peak["goodput_per_s"]}
    for factor in FACTORS:
        per_s = factor * float(peak["goodput_per_s"])  # type: ignore[arg-type]
        tally = open_loop(HOST, server.port, sent, check, per_s=per_s, seconds=seconds, warm_s=WARM_S)
        found[str(factor)] = {"offered_per_s": per_s, **tally.figures(GOOD_WITHIN_S)}
    return found
