"""The code of this repository at another commit, with a Python that runs it and nothing of ours. Starts no server.

What it needs is taken from this program's own environment where that has all of it, else installed once.
"""

import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from benchmarks.serving import environments

ROOT = Path(__file__).parents[2]
PREFIX = "ours@"
"""Begins the name of a peer that is another commit: `ours@REVISION`, or `ours@DIRECTORY` of a checkout."""
_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Code:
    """One state of this repository."""

    name: str
    """Of the side in all results."""
    python: Path
    root: Path
    """The working directory of its commands, which Python searches before anything else."""
    revision: str
    """Commit, with `+` for changes that are not committed; empty where there is no git."""


def here() -> Code:
    """The code that this program belongs to."""
    return Code("maas", Path(sys.executable), ROOT, _revision(ROOT))


def other(name: str, directory: Path, cache: Path) -> Code:
    """Another commit, ready to run.

    Args:
        name: `PREFIX` with a revision that git knows, or with the directory of a checkout, whose files are then
            used as they are.
        directory: empty; the files of a revision and the environment are put below it.
        cache: where `environments.build` installs what it needs if ours will not do.

    Raises:
        ValueError: git does not know the revision, or the Python does not import its code.
    """
    source = name.removeprefix(PREFIX)
    if _is_checkout(source):
        root = Path(source).absolute()
        revision = _revision(root)
    else:
        revision = resolve(source)
        root = _unpack(revision, directory)
    wanted = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    packages = Path(sysconfig.get_path("purelib"))
    if not all(map(is_installed, wanted["dependencies"])):
        installed = environments.build(cache, "ours", tuple(wanted["dependencies"]))
        packages = next(installed.parent.parent.glob("lib/python*/site-packages"))
    python = _environment(directory / "env", (root, packages), wanted["scripts"])
    asked = [str(python), "-c", "import maas_ray; print(maas_ray.__file__)"]
    imported = subprocess.run(asked, capture_output=True, text=True, cwd=directory, timeout=_TIMEOUT_S)
    if not imported.stdout.startswith(str(root)):
        raise ValueError(f"{name} does not import its own code from {root}: {imported.stdout}{imported.stderr[-500:]}")
    return Code(name, python, root, revision)


def check(name: str) -> None:
    """Raises `ValueError` unless there is such a commit or checkout."""
    source = name.removeprefix(PREFIX)
    if not _is_checkout(source):
        resolve(source)


def _is_checkout(source: str) -> bool:
    return Path(source, "maas_ray", "__init__.py").exists()


def _unpack(revision: str, directory: Path) -> Path:
    archive, root = directory / "code.tar", directory / "code"
    subprocess.run(
        ["git", "archive", "--format=tar", "-o", str(archive), revision], cwd=ROOT, check=True, timeout=_TIMEOUT_S
    )
    with tarfile.open(archive) as files:
        files.extractall(root, filter="data")
    return root


def resolve(revision: str) -> str:
    """The short name of the commit. Raises `ValueError` if git does not know it."""
    command = ["git", "rev-parse", "--verify", "--quiet", "--short", "--end-of-options", f"{revision}^{{commit}}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if found.returncode != 0:
        raise ValueError(f"{revision!r} is neither a directory with a checkout nor a revision that git knows here")
    return found.stdout.strip()


def _revision(root: Path) -> str:
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    found = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=_TIMEOUT_S)
    return found.stdout.strip()


def is_installed(requirement: str) -> bool:
    """Whether this program's own environment has such a package, if this machine needs it at all."""
    wanted = Requirement(requirement)
    if wanted.marker is not None and not wanted.marker.evaluate():
        return True
    try:
        return wanted.specifier.contains(metadata.version(wanted.name), prereleases=True)
    except metadata.PackageNotFoundError:
        return False


def _environment(directory: Path, search: tuple[Path, ...], scripts: dict[str, str]) -> Path:
    """An environment of no packages: what it imports is found in `search`, and it has the programs of the project."""
    venv.create(directory, with_pip=False)
    python = directory / "bin" / "python"
    site = next(directory.glob("lib/python*/site-packages"))
    # A plain line is searched; the .pth files there, one of which names this code, are not read again.
    (site / "code.pth").write_text("".join(f"{path}\n" for path in search))
    for program, target in scripts.items():
        module, function = target.split(":")
        path = directory / "bin" / program
        path.write_text(f"#!{python}\nimport sys\nfrom {module} import {function}\nsys.exit({function}())\n")
        path.chmod(0o755)
    return python
