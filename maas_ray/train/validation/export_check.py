"""Checks before a run's first step that its model can be published, in a child process with limits.

The exporter's imports take several seconds. The child's server is therefore started with the run and imports them while
the data is prepared and the workers start. Imports no torch itself.
"""

import os
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from maas_ray import confined
from maas_ray.confined.child import error_of
from maas_ray.data.spec.features import Features
from maas_ray.display import get_logger
from maas_ray.errors import BundleError, ConfinedError, MaasError
from maas_ray.export.column_names import refuse_names
from maas_ray.train.spec.train import TrainSpec

_FUNCTION = "maas_ray.train.validation.untrained_export:check"
_WHAT = "the export of the untrained model"
WALL_S = 60.0
"""Time limit of the check; the built-in families take a few seconds. A run whose check takes longer is not refused."""
MEMORY_BYTES = 12 << 30
"""Memory limit: a graph of at most 2 GB exists as the module, as a copy, as a program, as a graph and in the runtime."""


_ANSWER_S = 3 * WALL_S
"""Time limit of the check with the start of its process and its imports."""

log = get_logger(__name__)


@dataclass(frozen=True)
class ExportVerdict:
    """The result of a check; without a text, the model can be published."""

    obstacle: str | None = None
    """Reason why the model cannot be published."""
    code: str = ""
    """Code of the error that `publish` would raise."""
    note: str | None = None
    """Reason why there is no bundle for this task, or why nothing was checked. Not an error."""


def prepare_check() -> None:
    """Starts the server that imports the exporter; an error recurs at the check."""
    with suppress(ConfinedError):
        confined.start(_FUNCTION, what=_WHAT).close()


def run_check(spec: str, data_digest: str) -> ExportVerdict:
    """Builds the untrained model in a child process, exports it and compares the graph with it.

    Args:
        spec: the TrainSpec as JSON, with an absolute store.
        data_digest: the prepared data set.
    """
    payload = {
        "spec": spec,
        "data_digest": data_digest,
        # The model's module may depend on both; a confined child has neither.
        "path": [os.path.abspath(path) for path in sys.path],
        "environ": dict(os.environ),
    }
    limits = confined.Limits(wall_s=WALL_S, memory_bytes=MEMORY_BYTES, file_bytes=None)
    try:
        found = confined.call(_FUNCTION, payload, limits=limits, what=_WHAT).payload
    except ConfinedError as error:
        return ExportVerdict(note=f"whether the model can be published was not checked: {error}")
    return ExportVerdict(**found)


class PendingCheck:
    """A check that runs while the workers of a run start.

    Args:
        spec: the run.
        verdict: reference to the `ExportVerdict`.
    """

    def __init__(self, spec: TrainSpec, verdict: Any) -> None:
        self._spec = spec
        self._verdict = verdict
        self._deadline_s = time.monotonic() + _ANSWER_S

    def is_done(self) -> bool:
        """Whether the verdict is known, or is no longer waited for."""
        return bool(ray.wait([self._verdict], timeout=0)[0]) or time.monotonic() > self._deadline_s

    def failure(self) -> MaasError | None:
        """The error of a run that must not start, or None; warnings are logged."""
        try:
            verdict: ExportVerdict = ray.get(self._verdict, timeout=0)
        except ray.exceptions.RayError as error:  # no reason to refuse a run
            verdict = ExportVerdict(note=f"whether the model can be published was not checked: {error}")
        if verdict.note is not None:
            log.warning("%s", verdict.note)
        if verdict.obstacle is None:
            return None
        return refused(self._spec, verdict.code, verdict.obstacle)


def check_names(spec: TrainSpec, features: Features) -> None:
    """Checks only that the columns can be inputs of a graph, which is all that a classical model needs.

    Raises:
        BundleError: they cannot, and the spec refuses such a run.
    """
    if spec.export_check == "off":
        return
    try:
        refuse_names(features)
    except BundleError as error:
        if (failure := refused(spec, error.code, str(error))) is not None:
            raise failure from error


def refused(spec: TrainSpec, code: str, obstacle: str) -> MaasError | None:
    """The error for an obstacle if the spec refuses such a run, else None and a warning."""
    reason = f"run {spec.run!r}: the model can be trained, but not published: {obstacle}"
    if spec.export_check == "warn":
        log.warning("%s", reason)
        return None
    return error_of(code, [f"{reason}; set export_check: warn to train it nevertheless"])
