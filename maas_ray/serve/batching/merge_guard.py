"""Merge guard: checks that merged requests get the same outputs as alone. The batcher executes the runs.

Graph analysis and probes at load time decide whether requests may share a run. This guard detects an error of both:
a share of the merged requests is run again alone while the engine is idle.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from maas_ray.bundle.axis.compare import differs
from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.padding import Padding
from maas_ray.serve.batching.item import Item, Tensors

_RTOL = 1e-2
"""Kernels for different numbers of rows round differently; mixed rows are seldom this close."""
_MOST_FLIPS = 3
"""This many consecutive requests with different integers, unless among copies of themselves, are not rounding."""


@dataclass(frozen=True)
class Sample:
    """A request that was answered from a merged run."""

    inputs: Tensors
    num_rows: int
    start: int
    """Index of its first row in the run."""
    total: int
    """Number of rows of the run."""
    answer: Mapping[str, Array]
    is_repeated: bool = False
    """To be run among copies of itself, which shows whether the other rows of the run caused the difference."""

    def feed(self) -> tuple[Tensors, int]:
        """Returns the inputs to run, and their number of rows."""
        if not self.is_repeated:
            return self.inputs, self.num_rows
        places = (np.arange(self.total) - self.start) % self.num_rows
        return {name: array[places] for name, array in self.inputs.items()}, self.total

    def own(self, outputs: Tensors) -> Mapping[str, Array]:
        """Returns its own rows of the outputs."""
        if not self.is_repeated:
            return outputs
        return {name: array[self.start : self.start + self.num_rows] for name, array in outputs.items()}


class Guard:
    """Takes samples and compares them.

    Args:
        share: share of the merged requests that are sampled; above 0.
    """

    def __init__(self, share: float) -> None:
        self._every = max(1, round(1 / share))
        self.left = self._every
        """Merged requests until the next sample."""
        self.sample: Sample | None = None
        """Sample that waits until the engine is idle."""
        self._num_taken = self._num_flips = 0

    def take(self, batch: list[Item], outputs: Tensors, padding: Padding | None = None) -> None:
        """Samples one request of a merged run, unless a sample is already waiting."""
        self.left = self._every
        if self.sample is not None:
            return
        self._num_taken += 1
        chosen = batch[self._num_taken % len(batch)]
        if chosen.done is None:  # it was cancelled, and its inputs were released
            return
        start = 0
        for item in batch:
            if item is chosen:
                break
            start += item.num_rows
        stop = start + chosen.num_rows
        total = sum(item.num_rows for item in batch)
        if padding is not None:
            answer = padding.own(chosen.inputs, outputs, start, stop)
        else:
            answer = {name: array[start:stop] for name, array in outputs.items()}
        # A copy: a view would keep the outputs of all other requests in memory.
        kept = {name: array.copy() for name, array in answer.items()}
        self.sample = Sample(chosen.inputs, chosen.num_rows, start, total, kept)

    def compare(self, sample: Sample, outputs: Tensors) -> str:
        """Returns the difference between the outputs that were sent and those of the repeated run; empty if equal.

        If only integers differ, the cause may be two nearly equal scores: the sample must then be run once more, among
        copies of itself, by the same kernels as before.
        """
        found = sample.own(outputs)
        wrong = [name for name, array in sample.answer.items() if differs(array, found[name], _RTOL)]
        if not wrong:
            self._num_flips = self._num_flips if sample.is_repeated else 0
            return ""
        is_rounded = all(sample.answer[name].dtype.kind in "iu" for name in wrong)
        if is_rounded and not sample.is_repeated:
            self._num_flips += 1
            if self._num_flips < _MOST_FLIPS:
                self.sample = replace(sample, is_repeated=True)
                return ""
        return f"output {wrong[0]!r} of a request differed between a run of {sample.total} rows and the request alone"
