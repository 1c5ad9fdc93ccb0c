"""The files of the repository, with those that are new and not ignored."""

import subprocess

from tests.support.root import ROOT


def files() -> list[str]:
    """Their paths."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]
