"""Back ends of pools: repeated requests, response timeouts, body limits, and health checks."""

import re
from collections.abc import Mapping
from math import ceil

from maas_ray.haproxy.config.answers import HEADER_TIMEOUT_S, error
from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.config.sections import Section, replace
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE

MARGIN_MS = 700
"""Additional time that HAProxy waits beyond a replica's limit: the replica's own error is more specific."""
TIMEOUT_HEADER = "x-request-timeout-ms"
"""Time limit set by the client; the replica enforces it too, while it is alive."""

CHECK_TIMEOUT_MS = 1100
"""Timeout of a health check. Two consecutive timeouts mark a replica as down, at most an interval
(`check_interval_ms`) + 1100 + 100 + 1100 ms after it became silent."""
MIN_CHECK_INTERVAL_MS = 500
"""Minimum time between two checks of one server: silence is detected within 2.8 s."""
MAX_CHECKS_PER_S = 500
"""Maximum checks of one HAProxy. They take it 3 % of a core, and all replicas together 15 to 28 %
(docs/clusters/scale.md), and each node has a HAProxy; with more than 250 servers the interval grows instead."""
# A stopping replica answers this while it finishes its requests: it must not be considered dead, since connections of
# dead ones are closed.
_ALIVE = "    http-check expect rstring success|DRAINING"

CONNECT_TIMEOUT_MS = 1000
"""Timeout of a connection to a replica; shorter than the checks need to detect an unreachable host."""
_OBSERVED = re.compile(r" observe \S+ error-limit \d+ on-error mark-down")
_REPLICA = re.compile(r"\s+server (SERVE_REPLICA_\S+) ")
_HTTP = "backend http-"
_PROTOCOL = re.compile(r"^backend (http|grpc)-")
# A body that fits a buffer is held until it is complete: only such a request can be repeated, and slow clients occupy
# no replica. `option http-buffer-request` would wait even for a body that is refused for its length.
_WAIT_FOR_BODY = f"    http-request wait-for-body time {HEADER_TIMEOUT_S}s"


def application_of(section: Section) -> str:
    """Returns the application of an HTTP back end, in HAProxy's spelling; empty if it has none."""
    return section[0].removeprefix(_HTTP) if section[0].startswith(_HTTP) else ""


def replicas_of(section: Section) -> list[str]:
    """Returns the names of the servers that are replicas."""
    return [match[1] for line in section if (match := _REPLICA.match(line))]


def check_interval_ms(num_servers: int) -> int:
    """Returns the time between two checks of one server, given the number of checked servers."""
    return max(MIN_CHECK_INTERVAL_MS, ceil(num_servers * 1000 / MAX_CHECKS_PER_S))


def edit_pool(section: Section, limits: Mapping[str, PoolLimits], interval_ms: int = MIN_CHECK_INTERVAL_MS) -> None:
    """Configures the back end of a pool; an application that is not ours only gets more frequent checks.

    Args:
        section: section of the back end.
        limits: limits by application.
        interval_ms: time between two checks of one server, see `check_interval_ms`.
    """
    checks = f"inter {interval_ms}ms fastinter 100ms downinter {interval_ms // 2}ms fall 2 rise 1 check"
    replace(section, "default-server ", lambda _: f"    default-server {checks}")
    application = application_of(section)
    if not application:
        return  # gRPC, whose streams may be silent for long
    replace(section, "http-check expect ", lambda _: _ALIVE)
    found = limits.get(application)
    is_ours = is_own(section) or not replicas_of(section)
    lines = _bounds(found, is_asleep=not replicas_of(section)) if found is not None and is_ours else []
    if is_replayable(section):
        lines += replay()
        # Only checks mark a replica down: if a failed connection does (`observe`), HAProxy 2.8 closes the very request
        # that failed, which would have been repeated. `on-marked-down shutdown-sessions` would free the requests in a
        # silent replica, but was seen to end six that were to be repeated after a kill (see haproxy/silent.py).
        section[:] = [_OBSERVED.sub("", line) if _REPLICA.match(line) else line for line in section]
    else:
        lines.append(_WAIT_FOR_BODY)
    section[1:1] = lines


def replay() -> Section:
    """Returns the lines with which a back end repeats a request whose replica was lost before it responded."""
    return [
        _WAIT_FOR_BODY,
        # Bytes were sent and none were received: the replica died while it held the request.
        "    retry-on conn-failure empty-response",
        # At most once (HAProxy's default is three times): a request that ended a replica must not end further ones.
        # Versions that a value can crash run in separate processes, so this is the second line of defense.
        "    retries 1",
        f"    timeout connect {CONNECT_TIMEOUT_MS}ms",
    ]


def server_timeout(limits: PoolLimits) -> str:
    """Returns how long HAProxy waits for the response of a pool."""
    return f"    timeout server {ceil(limits.timeout_s * 1000) + MARGIN_MS}ms"


def _bounds(limits: PoolLimits, is_asleep: bool) -> list[str]:
    longest_ms = ceil(limits.timeout_s * 1000)
    given = f"req.hdr_val({TIMEOUT_HEADER})"
    refusal = error(
        f"the body is larger than the limit of {limits.max_body_bytes} bytes; send a smaller one, or raise "
        "limits.max_body_bytes"
    )
    lines = [
        # The declared length, and the received bytes of a chunked body; checking the header would cost every request
        # more.
        f"    http-request return status 413 content-type application/json string '{refusal}' "
        f"if {{ req.body_size gt {limits.max_body_bytes} }}",
        f"    http-request set-timeout server {given},add({MARGIN_MS}) "
        f"if {{ {given} gt 0 }} {{ {given} lt {longest_ms} }}",
    ]
    # A pool scaled to zero needs time to start, which is not part of the response time.
    return lines if is_asleep else [server_timeout(limits), *lines]


def is_replayable(section: Section) -> bool:
    """Whether requests to a back end may be repeated, by its replicas' deployment name; False if it is not ours."""
    return _are_of(section, REPLAYABLE)


def is_own(section: Section) -> bool:
    """Whether all replicas of a back end belong to a pool."""
    return is_replayable(section) or _are_of(section, NOT_REPLAYABLE)


def _are_of(section: Section, deployment: str) -> bool:
    # Serve's names: backend `<protocol>-<application>`, server `SERVE_REPLICA_<application>-<deployment>-<id>`.
    wanted = f"SERVE_REPLICA_{_PROTOCOL.sub('', section[0])}-{deployment}-"
    names = replicas_of(section)
    return bool(names) and all(name.startswith(wanted) and "-" not in name[len(wanted) :] for name in names)
