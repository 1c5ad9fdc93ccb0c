"""Response of a scrape: the text in the requested format, compressed if the scraper accepts it. Runs in a thread."""

import gzip
from collections.abc import Iterable, Mapping
from typing import Any

from maas_ray.serve.request.head import Header
from maas_ray.serve.request.response import Reply
from maas_ray.serve.telemetry.prometheus import CONTENT_TYPE, OPENMETRICS_CONTENT_TYPE, exposition

COMPRESS_BYTES = 1024
"""A shorter text fits into one packet either way."""
_LEVEL = 4


def scrape(
    headers: Iterable[Header], replicas: Iterable[Mapping[str, Any]], *, pool: str, num_silent: int = 0
) -> Reply:
    """Returns the response of `GET /metrics`.

    Args:
        headers: headers of the request; uses `accept` and `accept-encoding`.
        replicas: see `exposition`.
        pool: see `exposition`.
        num_silent: see `exposition`.
    """
    given = list(headers)
    openmetrics = any(name == b"accept" and b"application/openmetrics-text" in value for name, value in given)
    text = exposition(replicas, pool=pool, num_silent=num_silent, openmetrics=openmetrics)
    kind = OPENMETRICS_CONTENT_TYPE if openmetrics else CONTENT_TYPE
    answer: tuple[Header, ...] = ((b"content-type", kind), (b"vary", b"accept, accept-encoding"))
    if len(text) < COMPRESS_BYTES or not accepts_gzip(given):
        return Reply(200, answer, text)
    return Reply(200, (*answer, (b"content-encoding", b"gzip")), gzip.compress(text, _LEVEL, mtime=0))


def accepts_gzip(headers: Iterable[Header]) -> bool:
    """Whether `accept-encoding` allows gzip (RFC 9110 12.5.3): by name or by `*`, and not with a weight of zero."""
    weights: dict[bytes, float] = {}
    for name, value in headers:
        for item in value.split(b",") if name == b"accept-encoding" else ():
            coding, _, parameter = item.partition(b";")
            key, _, weight = parameter.replace(b" ", b"").partition(b"=")
            try:
                weights[coding.strip().lower()] = float(weight) if key == b"q" else 1.0
            except ValueError:
                continue
    return weights.get(b"gzip", weights.get(b"x-gzip", weights.get(b"*", 0.0))) > 0
