"""Records a few steps with torch's profiler: one Chrome trace per rank. Independent of runs and of the loop.

Open traces with chrome://tracing or https://ui.perfetto.dev.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from maas_ray.train.spec.performance import ProfileSpec

SUFFIX = ".json.gz"


class Profiler:
    """Records the steps of a spec and passes the trace to a function; `close` it.

    Args:
        spec: the steps.
        rank: rank of this process.
        keep: called once with a name and the gzipped trace, even if the run ends before the last of the steps.
    """

    def __init__(self, spec: ProfileSpec, rank: int, keep: Callable[[str, bytes], None]) -> None:
        self._first, self._after = spec.first_step, spec.first_step + spec.steps
        self._rank = rank
        self._keep = keep
        self._running: Any = None

    def begin(self, step: int) -> None:
        """Must be called at the start of step number `step` (from 1), and once more after the last step."""
        if step == self._first:
            from torch.profiler import profile  # late: it loads the tracing library

            self._running = profile(record_shapes=True)
            self._running.__enter__()
        elif step >= self._after:
            self.close()

    def close(self) -> None:
        """Ends a running recording and passes on its trace."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.__exit__(None, None, None)
        with tempfile.TemporaryDirectory(prefix="maas-profile-") as directory:
            path = Path(directory) / f"trace{SUFFIX}"
            running.export_chrome_trace(str(path))
            self._keep(f"step-{self._first}-rank-{self._rank}{SUFFIX}", path.read_bytes())
