"""Records a few steps with torch's profiler: one Chrome trace per rank. Knows no run and no loop.

Looked at in chrome://tracing or https://ui.perfetto.dev.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maas_ray.train.spec.performance import ProfileSpec

SUFFIX = ".json.gz"


class Profiler:
    """Records the steps that a spec names, and gives their trace to a function. To be closed.

    Args:
        spec: which steps.
        rank: this process.
        keep: called once with a name and the gzipped trace, also where the run ends before the last of the steps.
    """

    def __init__(self, spec: ProfileSpec, rank: int, keep: Callable[[str, bytes], None]) -> None:
        self._first, self._after = spec.first_step, spec.first_step + spec.steps
        self._rank = rank
        self._keep = keep
        self._running: Any = None

    def begin(self, step: int) -> None:
        """To be called as step number `step` (from 1) begins, and once more after the last one."""
        if step == self._first:
            from torch.profiler import profile  # late: it takes the tracing library along

            self._running = profile(record_shapes=True)
            self._running.__enter__()
        elif step >= self._after:
            self.close()

    def close(self) -> None:
        """Ends a recording that goes on, and hands over its trace."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        with tempfile.TemporaryDirectory(prefix="maas-profile-") as directory:
            path = Path(directory) / f"trace{SUFFIX}"
            running.export_chrome_trace(str(path))
            self._keep(f"step-{self._first}-rank-{self._rank}{SUFFIX}", path.read_bytes())
