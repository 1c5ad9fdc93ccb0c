"""The version of the code that a run records."""

import subprocess
from pathlib import Path


def git_commit(directory: Path) -> str | None:
    """The current commit of `directory`, with `+changes` if files differ from it; None outside a git repository."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None  # no git on this machine: lineage then consists of the spec and data digests
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    return f"{commit}+changes" if git("status", "--porcelain") else commit
