"""The processes that belong to one home, whoever started them."""

from pathlib import Path

from ray._common.utils import psutil


def processes_with_home(home: Path) -> list[str]:
    """The commands of all running processes whose environment has this `HOME`."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("HOME") == str(home) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except (psutil.Error, OSError):
            continue  # it ended meanwhile, or belongs to another user
    return found
