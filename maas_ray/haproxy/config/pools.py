"""The back ends of pools: what may be repeated, how long an answer may take, how large a body may be, who is silent."""

import re
from collections.abc import Mapping
from math import ceil

from maas_ray.haproxy.config.answers import HEADER_TIMEOUT_S, error
from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.config.sections import Section, replace
from maas_ray.haproxy.names import NOT_REPLAYABLE, REPLAYABLE

MARGIN_MS = 700
"""HAProxy waits so much longer than a replica may take, whose own refusal says more."""
TIMEOUT_HEADER = "x-request-timeout-ms"
"""What a caller allows; the replica keeps it too, while it is alive."""

CHECK_TIMEOUT_MS = 1100
"""Longest time for the answer to a health check. Two that are late in a row take a replica out of the rotation, at most
an interval (`check_interval_ms`) + 1100 + 100 + 1100 ms after it fell silent."""
MIN_CHECK_INTERVAL_MS = 500
"""Between two checks of one server: silence is noticed within 2.8 s."""
MAX_CHECKS_PER_S = 500
"""Of one HAProxy. It takes 3 % of a core for them and all replicas together 15 to 28 % (docs/clusters/scale.md), and each node
has a HAProxy; with more than 250 servers the interval grows instead."""
# A replica that is ending answers this while it works off what it has: it must not be taken for a dead one, whose
# connections are closed.
_ALIVE = "    http-check expect rstring success|DRAINING"

CONNECT_TIMEOUT_MS = 1000
"""Longest time for a connection to a replica; shorter than the checks need to notice a host that is gone."""
_OBSERVED = re.compile(r" observe \S+ error-limit \d+ on-error mark-down")
_REPLICA = re.compile(r"\s+server (SERVE_REPLICA_\S+) ")
_HTTP = "backend http-"
_PROTOCOL = re.compile(r"^backend (http|grpc)-")
# A body that fits a buffer is held until it is complete: only such a request can be repeated, and slow senders occupy no
# replica. `option http-buffer-request` would wait before a body is refused for its length.
_WAIT_FOR_BODY = f"    http-request wait-for-body time {HEADER_TIMEOUT_S}s"


def application_of(section: Section) -> str:
    """The application, as its name stands in HAProxy's, that an HTTP back end belongs to; empty if it is none."""
    return section[0].removeprefix(_HTTP) if section[0].startswith(_HTTP) else ""


def replicas_of(section: Section) -> list[str]:
    """Names of the servers that are replicas."""
    return [match[1] for line in section if (match := _REPLICA.match(line))]


def check_interval_ms(num_servers: int) -> int:
    """Time between two checks of one server, with so many servers that are checked."""
    return max(MIN_CHECK_INTERVAL_MS, ceil(num_servers * 1000 / MAX_CHECKS_PER_S))


def edit_pool(section: Section, limits: Mapping[str, PoolLimits], interval_ms: int = MIN_CHECK_INTERVAL_MS) -> None:
    """Makes the back end of an application what its pool needs; another's application only gets quicker checks.

    Args:
        section: of the back end.
        limits: by application.
        interval_ms: between two checks of one server, see `check_interval_ms`.
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
        # What marks a replica down are the checks alone: where a failed connection does (`observe`), HAProxy 2.8 closes
        # the very request that failed, which would have been repeated. `on-marked-down shutdown-sessions` would free the
        # requests in a silent replica, but was seen to end six that a kill left to be repeated (see haproxy/silent.py).
        section[:] = [_OBSERVED.sub("", line) if _REPLICA.match(line) else line for line in section]
    else:
        lines.append(_WAIT_FOR_BODY)
    section[1:1] = lines


def replay() -> Section:
    """Lines by which a back end repeats a request whose replica was lost before anything of its answer came."""
    return [
        _WAIT_FOR_BODY,
        # Bytes were sent and nothing came back: the replica died while it held the request.
        "    retry-on conn-failure empty-response",
        # At most once (HAProxy's default is three times): a request that ended a replica must not end the next ones too.
        # Versions that a value can crash run in processes of their own, so this is the second line of defense.
        "    retries 1",
        f"    timeout connect {CONNECT_TIMEOUT_MS}ms",
    ]


def server_timeout(limits: PoolLimits) -> str:
    """How long HAProxy waits for the answer of a pool."""
    return f"    timeout server {ceil(limits.timeout_s * 1000) + MARGIN_MS}ms"


def _bounds(limits: PoolLimits, is_asleep: bool) -> list[str]:
    longest_ms = ceil(limits.timeout_s * 1000)
    given = f"req.hdr_val({TIMEOUT_HEADER})"
    refusal = error(
        f"the body is larger than the {limits.max_body_bytes} bytes that this pool takes; send a smaller one, or raise "
        "limits.max_body_bytes"
    )
    lines = [
        # The declared length and what has come of a chunked body; looking for the header costs every request more.
        f"    http-request return status 413 content-type application/json string '{refusal}' "
        f"if {{ req.body_size gt {limits.max_body_bytes} }}",
        f"    http-request set-timeout server {given},add({MARGIN_MS}) "
        f"if {{ {given} gt 0 }} {{ {given} lt {longest_ms} }}",
    ]
    # A pool that sleeps takes its time to wake, which is no part of an answer.
    return lines if is_asleep else [server_timeout(limits), *lines]


def is_replayable(section: Section) -> bool:
    """Whether all replicas of a back end say so, by the name of their deployment; another's application never does."""
    return _are_of(section, REPLAYABLE)


def is_own(section: Section) -> bool:
    """Whether all replicas of a back end are those of a pool."""
    return is_replayable(section) or _are_of(section, NOT_REPLAYABLE)


def _are_of(section: Section, deployment: str) -> bool:
    # Serve's names: backend `<protocol>-<application>`, server `SERVE_REPLICA_<application>-<deployment>-<id>`.
    wanted = f"SERVE_REPLICA_{_PROTOCOL.sub('', section[0])}-{deployment}-"
    names = replicas_of(section)
    return bool(names) and all(name.startswith(wanted) and "-" not in name[len(wanted) :] for name in names)
