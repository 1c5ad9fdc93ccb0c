"""Compares two sets of outputs for the same rows: errors, and tolerance. Runs nothing."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from maas_ray.arrays import Array
from maas_ray.bundle.format import Signature
from maas_ray.errors import GateError

_CLASS_DATATYPE = "INT64"


@dataclass
class _Errors:
    absolute: float = 0.0
    relative: float = 0.0


class Comparison:
    """Compares outputs of the graph, at several batch sizes, with those of the trained model.

    Args:
        signature: the outputs; the first contains the scores, one of datatype INT64 the classes.
        reference: the model's outputs by name, each [N, ...].
        num_real: number of real rows; the others are random.
        atol: absolute tolerance in the unit of the output; see ParitySpec.
        rtol: relative tolerance.
        source: library that computed the reference, for messages.
        threshold: the probability that divides two classes with a single score.
    """

    def __init__(
        self,
        signature: Signature,
        reference: dict[str, Array],
        num_real: int,
        *,
        atol: float,
        rtol: float,
        source: str = "torch",
        threshold: float = 0.5,
    ) -> None:
        self._reference, self._num_real, self._atol, self._rtol = reference, num_real, atol, rtol
        self._source, self._threshold = source, threshold
        self._errors = {name: _Errors() for name, values in reference.items() if values.dtype == np.float32}
        self._classes = next((out.name for out in signature.outputs if out.datatype == _CLASS_DATATYPE), None)
        self._scores = signature.outputs[0].name
        self._agreement = 1.0

    def check(self, outputs: dict[str, Array], batch_size: int) -> None:
        """Raises GateError if an output exceeds the tolerance."""
        for name, values in outputs.items():
            expected = self._reference[name]
            if values.dtype != expected.dtype or values.shape != expected.shape:
                raise GateError(
                    f"output {name!r} at batch size {batch_size}: onnxruntime returns "
                    f"{values.dtype}{list(values.shape)}, {self._source} returns "
                    f"{expected.dtype}{list(expected.shape)} for all rows"
                )
            if name == self._classes:
                self._check_classes(name, values, expected, batch_size)
            else:
                self._check_values(name, values, expected, batch_size)

    def report(self) -> dict[str, Any]:
        """The errors over all batch sizes so far; see `check_parity`."""
        outputs = {
            name: {"max_abs_error": errors.absolute, "max_rel_error": errors.relative}
            for name, errors in self._errors.items()
        }
        return {
            "passed": True,
            "max_abs_error": max(errors.absolute for errors in self._errors.values()),
            "max_rel_error": max(errors.relative for errors in self._errors.values()),
            "top1_agreement": self._agreement if self._classes else None,
            "outputs": outputs,
        }

    def _check_values(self, name: str, values: Array, expected: Array, batch_size: int) -> None:
        wrong_kind = (np.isnan(values) != np.isnan(expected)) | (
            (np.isinf(values) | np.isinf(expected)) & (values != expected) & ~np.isnan(expected)
        )
        if wrong_kind.any():
            self._fail(name, batch_size, values, expected, np.unravel_index(wrong_kind.argmax(), values.shape), None)
        finite = np.isfinite(expected)
        exact = np.where(finite, expected, 0.0).astype(np.float64)
        error = np.abs(np.where(finite, values, 0.0) - exact)
        floor = self._floor()
        limit = floor + self._rtol * np.abs(exact)
        errors = self._errors[name]
        errors.absolute = max(errors.absolute, float(error.max()))
        size = np.maximum(np.abs(exact), floor)
        errors.relative = max(errors.relative, float((error[size > 0] / size[size > 0]).max(initial=0.0)))
        excess = error - limit
        if excess.max() > 0:
            worst = np.unravel_index(excess.argmax(), values.shape)
            self._fail(name, batch_size, values, expected, worst, float(limit[worst]))

    def _check_classes(self, name: str, values: Array, expected: Array, batch_size: int) -> None:
        same = values == expected
        self._agreement = min(self._agreement, float(same.mean()))
        # Two classes may be swapped only if their scores are within the tolerance.
        scores = self._reference[self._scores].astype(np.float64)
        if scores.shape[1] == 1:
            margin = 2 * np.abs(scores[:, 0] - self._threshold)
        else:
            ordered = np.sort(scores, axis=1)
            margin = ordered[:, -1] - ordered[:, -2]
        wrong = ~same & (margin > 2 * (self._atol + self._rtol * np.abs(scores).max(axis=1)))
        if wrong.any():
            self._fail(name, batch_size, values, expected, (int(wrong.argmax()),), None)

    def _floor(self) -> float:
        """The absolute tolerance in the output's own unit."""
        if self._classes:
            return self._atol
        expected = self._reference[self._scores].astype(np.float64)
        # From the real rows if there are any: extreme random rows would widen the tolerance.
        expected = expected[: self._num_real] if self._num_real else expected
        finite = expected[np.isfinite(expected)]
        return self._atol * float(np.sqrt(np.mean(np.square(finite)))) if finite.size else 0.0

    def _fail(
        self,
        name: str,
        batch_size: int,
        values: Array,
        expected: Array,
        place: tuple[Any, ...],
        limit: float | None,
    ) -> None:
        row = int(place[0])
        kind, number = ("real", row) if row < self._num_real else ("random", row - self._num_real)
        element = f", element {[int(i) for i in place[1:]]}" if place[1:] else ""
        got, wanted = values[place], expected[place]
        bound = (
            f"the difference {abs(float(got) - float(wanted)):.3g} is above the limit {limit:.3g} "
            f"(atol {self._atol:g}, rtol {self._rtol:g})"
            if limit is not None
            else "these must be equal"
        )
        raise GateError(
            f"output {name!r}, batch size {batch_size}, {kind} row {number}{element}: onnxruntime returns {got:.9g}, "
            f"{self._source} returns {wanted:.9g}; {bound}. The graph differs from the trained model; it must not be "
            "published"
        )
