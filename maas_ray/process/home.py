"""The directory of this package's local state: the record of a cluster, downloaded parts."""

import os
from pathlib import Path

HOME_VARIABLE = "MAAS_RAY_HOME"


def state_directory(path: str | Path | None = None) -> Path:
    """`path`, or `$MAAS_RAY_HOME`, or `~/.maas-ray`; absolute."""
    chosen = path or os.environ.get(HOME_VARIABLE) or "~/.maas-ray"
    return Path(chosen).expanduser().absolute()
