"""Launcher: the program that Ray Serve runs as its HAProxy; hardens Serve's configuration, then becomes HAProxy.

Serve has no options for most settings of a front, but runs the program in `RAY_SERVE_HAPROXY_BINARY_PATH`, at the start
and at every reload. The file is changed in place and the process is replaced, so that pid and arguments are those that
Serve knows. Starts in milliseconds: imports nothing of Ray.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from maas_ray.haproxy.binary import find_binary, with_json_pages
from maas_ray.haproxy.config.answers import write_error_files
from maas_ray.haproxy.config.capacity import TooFewFiles, capacity, write_capacity
from maas_ray.haproxy.config.harden import MARK, Options, harden
from maas_ray.haproxy.config.limits import limits_file, read_limits
from maas_ray.haproxy.config.secret import front_secret
from maas_ray.haproxy.config.sections import Unexpected
from maas_ray.haproxy.names import ACCESS_LOG_VARIABLE, HOST_FILE_VARIABLE, REASON_FILE, REFUSED_FILE
from maas_ray.haproxy.process import find
from maas_ray.haproxy.succession import is_manager, succeed
from maas_ray.process.open_files import raise_limit
from maas_ray.process.private_files import write_private

_CHECK_TIMEOUT_S = 10


def main() -> NoReturn:
    """`maas-ray-haproxy`: accepts HAProxy's own arguments."""
    arguments = sys.argv[1:]
    binary = find_binary()
    if "-f" in arguments[:-1]:
        path = Path(arguments[arguments.index("-f") + 1])
        binary = prepare(path, binary, os.environ)
        manager = find(os.getppid())
        if "-c" not in arguments and is_manager(manager):
            arguments = succeed(path, binary, arguments, manager)
    os.execv(binary, [binary, *arguments])  # noqa: S606


def prepare(path: Path, binary: str, environ: Mapping[str, str]) -> str:
    """Hardens a file in place; on failure the file is used unchanged: a front that starts is better than none.

    Args:
        path: Serve's file.
        binary: path of HAProxy.
        environ: environment variables with the options.

    Returns:
        Path of the program to run with the file.

    Raises:
        SystemExit: HAProxy could not start with this limit of open files; the reason is also written next to the file.
    """
    try:
        with_pages = with_json_pages(binary, path.parent)
    except (OSError, subprocess.SubprocessError) as error:
        _say(f"{path}: invalid HTTP requests get HAProxy's own error pages: {error}")
        with_pages = binary
    try:
        apply(path, with_pages, environ)
        for name in (REASON_FILE, REFUSED_FILE):
            (path.parent / name).unlink(missing_ok=True)
    except TooFewFiles as error:
        write_private(path.parent / REFUSED_FILE, f"{error}\n")
        raise SystemExit(f"maas-ray: {error}") from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        _say(f"{path} is used as Ray Serve wrote it, with open ports: {reason}")
        write_private(path.parent / REASON_FILE, reason + "\n")
    return with_pages


def apply(path: Path, binary: str, environ: Mapping[str, str]) -> None:
    """Hardens a file in place, if HAProxy accepts the result.

    Args:
        path: Serve's file; Serve's own text is kept next to it as `<name>.serve`.
        binary: path of HAProxy, which checks the new file.
        environ: environment variables with the options.

    Raises:
        TooFewFiles: see `capacity`.
        Unexpected: see `harden`; or HAProxy rejects the new file, with its message.
        OSError: a file cannot be read or written.
    """
    config = path.read_text()
    if config.startswith(MARK):
        return
    found = capacity(config, raise_limit())
    options = Options(
        host=Path(environ[HOST_FILE_VARIABLE]).read_text().strip() if _has_host_file(environ) else "",
        access_log=environ.get(ACCESS_LOG_VARIABLE) == "1",
        error_files=write_error_files(path.parent),
        limits=read_limits(limits_file(path)),
        secret=_secret(environ),
        capacity=found,
    )
    hardened = harden(config, options)
    draft = path.with_name(path.name + ".new")
    write_private(draft, hardened)
    checked = subprocess.run([binary, "-c", "-f", str(draft)], capture_output=True, text=True, timeout=_CHECK_TIMEOUT_S)
    if checked.returncode != 0:
        raise Unexpected(f"HAProxy rejects the hardened file: {(checked.stderr or checked.stdout).strip()[-500:]}")
    write_private(path.with_name(path.name + ".serve"), config)
    draft.replace(path)
    write_capacity(path.parent, found)
    if found.is_reduced:
        _say(str(found))


def _secret(environ: Mapping[str, str]) -> str:
    try:
        return front_secret(environ)
    except OSError as error:
        _say(f"replicas will refuse the requests of this front: the cluster's token cannot be read: {error}")
        return ""


def _has_host_file(environ: Mapping[str, str]) -> bool:
    return bool(environ.get(HOST_FILE_VARIABLE)) and Path(environ[HOST_FILE_VARIABLE]).exists()


def _say(text: str) -> None:
    sys.stderr.write(f"maas-ray: {text}\n")
    sys.stderr.flush()
