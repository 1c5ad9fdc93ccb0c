"""Builds one virtual environment per peer, with pinned versions. Knows no server.

Peers need versions that clash with each other's and with Ray's, so none shares ours.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

BUILD_TIMEOUT_S = 900.0
_PINNED = "pinned.json"


def default_cache() -> Path:
    """Where the environments are kept between runs."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "maas-ray" / "benchmarks"


def build(cache: Path, name: str, packages: tuple[str, ...]) -> Path:
    """Makes the environment unless it is there with the same packages.

    Args:
        cache: directory of all environments.
        name: of this one.
        packages: requirements with exact versions.

    Returns:
        Its Python.

    Raises:
        subprocess.SubprocessError: pip failed, or took too long.
    """
    digest = hashlib.sha256(json.dumps([sys.version, sorted(packages)]).encode()).hexdigest()[:12]
    directory = cache / f"{name}-{digest}"
    python = directory / "bin" / "python"
    if (directory / _PINNED).exists():
        return python
    print(f"building the environment of {name}", file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(directory)], check=True, timeout=BUILD_TIMEOUT_S)
    install = [str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-input", *packages]
    subprocess.run(install, check=True, timeout=BUILD_TIMEOUT_S, stderr=subprocess.DEVNULL)
    (directory / _PINNED).write_text(json.dumps(sorted(packages)))
    return python


def versions(python: Path, names: tuple[str, ...]) -> dict[str, str]:
    """Installed versions of the packages `names` in the environment of `python`."""
    code = "import importlib.metadata as m, json, sys; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    asked = subprocess.run([str(python), "-c", code, *names], capture_output=True, check=True, timeout=60, text=True)
    found: dict[str, str] = json.loads(asked.stdout)
    return found
