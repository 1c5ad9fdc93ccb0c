"""Hardening: edits the HAProxy configuration that Serve wrote. Each edit requires the line that it changes to exist."""

import re
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import NamedTuple

from maas_ray.haproxy.config.answers import HEADER_TIMEOUT_S, MISSING, STARTING, error
from maas_ray.haproxy.config.capacity import Capacity, fit
from maas_ray.haproxy.config.grpc import add_unary_twins, route_unnamed
from maas_ray.haproxy.config.half_closed import add_twins
from maas_ray.haproxy.config.limits import PoolLimits
from maas_ray.haproxy.config.pools import (
    CHECK_TIMEOUT_MS,
    application_of,
    check_interval_ms,
    edit_pool,
    is_own,
    replicas_of,
)
from maas_ray.haproxy.config.secret import HEADER
from maas_ray.haproxy.config.sections import Section, Unexpected, join, named, replace, split, substitute

MARK = "# hardened by maas-ray"
"""First line of a hardened configuration."""

PIPE_BYTES = 256 << 10
"""Bytes of a body, larger than any buffer, that are forwarded at once without a copy (Serve enables kernel splicing).
Measured with bodies of 602 KB: with the kernel's 64 KiB each cost HAProxy 273 microseconds of CPU, with 256 KiB 231,
and the replica is woken for larger pieces. Larger buffers (`tune.bufsize`) also help such bodies, but small requests,
each of which needs its own buffers, then cost 49 instead of 37 microseconds, and 20,000 connections four times the
memory."""
MIN_HARD_STOP_S = 120
"""Minimum time that a replaced HAProxy has for its last requests; streams have no limit of a pool."""
_HARD_STOP_MARGIN_S = 10

_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]*|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*|\*")
_GRPC_MESSAGE = re.compile(r'grpc-status 5 hdr grpc-message ".*"')
_GRPC_STARTING = f'grpc-status 14 hdr grpc-message "{STARTING}"'
_NO_ROUTES = "Route table is not populated yet."

# Serve obeys these from any client, who could disable the time limit, or the cancellation of unwanted work.
_TRUSTED_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
)


class Options(NamedTuple):
    """Options that may differ between clusters."""

    host: str = ""
    """Address to listen on; empty: Serve's."""
    access_log: bool = False
    """Whether to log one line per request."""
    error_files: Mapping[int, Path] = {}
    """Error files by status, from `write_error_files`."""
    limits: Mapping[str, PoolLimits] = {}
    """Limits by application."""
    secret: str = ""
    """Secret that replicas require from the front; empty: none (`secret`)."""
    capacity: Capacity | None = None
    """Capacity of HAProxy; None: the number that Serve wrote."""


def harden(config: str, options: Options) -> str:
    """Returns the hardened configuration.

    Args:
        config: Serve's configuration.
        options: see `Options`.

    Returns:
        The new configuration; a configuration that is already hardened is returned unchanged.

    Raises:
        Unexpected: a line to be changed does not exist, or the address is not valid.
    """
    if config.startswith(MARK):
        return config
    sections = split(config)
    _global(named(sections, "global"), options, _hard_stop_s(sections, options.limits))
    _defaults(named(sections, "defaults"), options)
    replace(named(sections, "frontend prometheus"), "bind :", lambda line: line.replace("bind :", "bind 127.0.0.1:"))
    replace(named(sections, "listen stats"), "bind *:", lambda line: line.replace("bind *:", "bind 127.0.0.1:"))
    _frontend(named(sections, "frontend http_frontend"), options)
    if grpc := [section for section in sections if section[0] == "frontend grpc_frontend"]:
        _listen_on(grpc[0], options.host)
        replace(grpc[0], "mode http", lambda line: "\n".join([line, *_signed(options)]))
        route_unnamed(grpc[0], sections)
        add_unary_twins(sections, grpc[0], options.limits)
    # Without twins, which share the checks of their server.
    interval_ms = check_interval_ms(sum(line.startswith("    server ") for section in sections for line in section))
    for section in sections:
        if is_backend(section):
            edit_pool(section, options.limits, interval_ms)
    add_twins(sections, named(sections, "frontend http_frontend"))
    is_starting = _NO_ROUTES in config
    _default_backend(named(sections, "backend default_backend"), is_starting)
    for section in sections if is_starting else ():
        if section[0] == "backend default_grpc_backend":  # UNAVAILABLE, after which clients retry, instead of NOT_FOUND
            section[:] = [_GRPC_MESSAGE.sub(_GRPC_STARTING, line) for line in section]
    if not options.access_log:
        for section in sections:
            section[:] = [line for line in section if line.strip() != "log global"]
    return f"{MARK}\n{join(sections)}"


def is_backend(section: Section) -> bool:
    """Whether a section is the back end of an application."""
    return section[0].startswith("backend ") and any(line.strip().startswith("default-server ") for line in section)


def _hard_stop_s(sections: list[Section], limits: Mapping[str, PoolLimits]) -> int | None:
    """Returns the time for the last requests of a replaced HAProxy; None if a pool's limits are unknown."""
    longest = float(MIN_HARD_STOP_S)
    for section in sections:
        application = application_of(section)
        if not application:
            continue
        found = limits.get(application)
        if found is None or (replicas_of(section) and not is_own(section)):
            return None
        longest = max(longest, found.timeout_s + found.drain_s + _HARD_STOP_MARGIN_S)
    return ceil(longest)


def _global(section: Section, options: Options, hard_stop_s: int | None) -> None:
    replace(section, "stats socket ", lambda line: substitute(line, " mode 666 ", " mode 600 "))
    if hard_stop_s is not None:
        replace(section, "hard-stop-after ", lambda _: f"    hard-stop-after {hard_stop_s}s")
    section[1:1] = [f"    tune.pipesize {PIPE_BYTES}"]
    if options.capacity is not None:
        fit(section, options.capacity)
    if not options.access_log:
        replace(section, "log ", lambda _: "")


def _defaults(section: Section, options: Options) -> None:
    timeouts = f"    timeout http-request {HEADER_TIMEOUT_S}s\n    timeout check {CHECK_TIMEOUT_MS}ms"
    replace(section, "mode http", lambda line: f"{line}\n{timeouts}")
    for status in (502, 503, 504):
        replace(section, f"errorfile {status} ", lambda _: "")
    section += [f"    errorfile {status} {path}" for status, path in options.error_files.items()]
    if not options.access_log:
        replace(section, "option httplog", lambda _: "")
        replace(section, "option log-health-checks", lambda _: "")


def _frontend(section: Section, options: Options) -> None:
    _listen_on(section, options.host)
    # HTTP/2 is for gRPC, which has another port: here it would be a second entrance with its own limits.
    section[2:2] = ["    option disable-h2-upgrade"]
    section[3:3] = [*(f"    http-request del-header {name}" for name in _TRUSTED_HEADERS), *_signed(options)]


def _signed(options: Options) -> Section:
    """Returns the line that proves to replicas that a request passed this front, whatever its client sent."""
    return [f"    http-request set-header {HEADER} {options.secret}"] if options.secret else []


def _default_backend(section: Section, is_starting: bool) -> None:
    status, text, extra = (503, STARTING, "hdr Retry-After 1 ") if is_starting else (404, MISSING, "")
    line = f"    http-request return status {status} content-type application/json {extra}string '{error(text)}'"
    replace(section, "http-request return status 404 ", lambda _: line)


def _listen_on(section: Section, host: str) -> None:
    if host and not _HOST.fullmatch(host):
        raise Unexpected(f"{host!r} is not an address to listen on")
    address = {"0.0.0.0": "*", "": r"\g<host>"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    replace(section, "bind ", lambda line: re.sub(r"(?<=bind )(?P<host>\S+)(?=:\d+( |$))", address, line))
