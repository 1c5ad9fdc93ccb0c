"""Runs a graph on rows together, alone and repeated, and compares the results: a check independent of operators.

A difference is a veto; if all rows give the same result, or the graph rejects the values, the check shows nothing.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from maas_ray.bundle import bfloat16
from maas_ray.bundle.axis.compare import differs
from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Signature, TensorSpec

Run = Callable[[Mapping[str, Array], int], Mapping[str, Array]]
"""Runs a number of rows; raises any exception for values that the graph rejects."""

FREE_SIZES = (3, 1, 8, 32, 64, 224)
"""Sizes that are tried for variable dimensions until the graph accepts one."""
BUDGET_S = 2.0
"""No further probe starts after this time; the first one always runs."""
_COUNTS = (3, 2, 5, 4)
_ALONE_RTOL = 1e-2
"""Kernels for different numbers of rows round differently; mixed rows are rarely that close."""
_REPEATED_RTOL = 1e-4
"""The same kernels on the same numbers of rows: a row's index and value are the same, only the other rows differ."""
_LARGEST = 127
"""Every integer datatype can represent it."""
_WORDS = ("a", "red", "Zebra 7", "", "12", "0.5", "true", "the quick brown fox", "ü", "x,y")


@dataclass(frozen=True)
class Probed:
    """The result of the probes."""

    told_apart: int = 0
    """Number of probes whose rows gave different results, none of which changed with the other rows."""
    difference: str = ""
    """Description of a changed result; empty: no change."""


def probe(run: Run, signature: Signature, seed: int = 0) -> Probed:
    """Compares rows run together with the same rows alone, and among copies of themselves.

    Args:
        run: runs the graph.
        signature: a signature whose inputs all begin with the batch dimension.
        seed: seed of the values.
    """
    until = time.perf_counter() + BUDGET_S
    told_apart, suspicions = 0, 0
    for number, values in enumerate(value_kinds(signature, seed)):
        if number and time.perf_counter() > until:
            break
        inputs = _accepted(run, values, _COUNTS[number % len(_COUNTS)])
        if inputs is None:
            continue
        found = _look(run, signature, inputs)
        told_apart += found.told_apart
        if found.difference:
            # Integers may flip if two scores are nearly equal, but not twice.
            suspicions += 1
            if suspicions > 1 or not found.difference.startswith(_FLIP):
                return Probed(told_apart, found.difference.removeprefix(_FLIP))
    return Probed(told_apart)


_FLIP = "?"
"""Prefix of a difference that rounding could explain."""


def _look(run: Run, signature: Signature, inputs: Mapping[str, Array]) -> Probed:
    count = len(next(iter(inputs.values())))
    together = _wide(signature, run(inputs, count))
    rows = [
        _wide(signature, run({name: array[row : row + 1] for name, array in inputs.items()}, 1)) for row in range(count)
    ]
    flip = ""
    for name, array in together.items():
        if array.shape[:1] != (count,) or any(alone[name].shape != (1, *array.shape[1:]) for alone in rows):
            return Probed(0, f"output {name!r} has other sizes for {count} rows than for each row alone")
        for row, alone in enumerate(rows):
            if differs(array[row : row + 1], alone[name], _ALONE_RTOL):
                text = f"output {name!r} of a row differs between {count} rows and the row alone"
                if array.dtype.kind == "f":
                    return Probed(0, text)
                flip = flip or _FLIP + text
    for row in {0, count - 1}:
        copies = _wide(
            signature, run({name: np.repeat(array[row : row + 1], count, 0) for name, array in inputs.items()}, count)
        )
        for name, array in together.items():
            if copies[name].shape != array.shape or differs(
                array[row : row + 1], copies[name][row : row + 1], _REPEATED_RTOL
            ):
                return Probed(0, f"output {name!r} of a row changes with the other rows")
    is_told = any(
        any(differs(array[:1], array[row : row + 1], 0.0) for row in range(1, count))
        for array in together.values()
        if array.size
    )
    return Probed(int(is_told), flip)


def _wide(signature: Signature, outputs: Mapping[str, Array]) -> Mapping[str, Array]:
    return bfloat16.widen(signature, outputs) if bfloat16.is_in(signature) else outputs


Draw = Callable[[TensorSpec, tuple[int, ...]], Array]


def _accepted(run: Run, draw: tuple[Signature, Draw], count: int) -> dict[str, Array] | None:
    """Values with sizes that the graph accepts; None if it accepts none of the tried sizes."""
    signature, values = draw
    has_free = any(-1 in tensor.shape[1:] for tensor in signature.required)
    for free in FREE_SIZES if has_free else (1,):
        inputs = {
            tensor.name: values(tensor, (count, *(free if size == -1 else size for size in tensor.shape[1:])))
            for tensor in signature.required
        }
        with suppress(Exception):  # the graph may accept other values
            run(inputs, count)
            run({name: array[:1] for name, array in inputs.items()}, 1)
            return inputs
    return None


def value_kinds(signature: Signature, seed: int) -> Iterator[tuple[Signature, Draw]]:
    """Kinds of random values, from those that most graphs accept to those that are most informative."""
    random = np.random.default_rng(seed)
    for scale, low, high in ((1.0, 1, 4), (-3.0, 0, 2), (100.0, 2, 100), (1e-3, 1, 127), (1e4, 1, 10)):

        def draw(
            tensor: TensorSpec, shape: tuple[int, ...], scale: float = scale, low: int = low, high: int = high
        ) -> Array:
            if tensor.datatype == "BYTES":
                return np.array(random.choice(_WORDS[: 6 if low else None], shape), dtype=object)
            if tensor.datatype == "BOOL":
                return random.integers(0, 2, shape).astype(np.bool_)
            if tensor.datatype == "BF16":
                return bfloat16.from_float32((random.random(shape) * scale).astype(np.float32))
            dtype = NUMPY[tensor.datatype]
            if dtype.kind == "f":
                # The first kind is between 0 and 1, as are probabilities and pixels.
                drawn = random.random(shape) if scale == 1.0 else random.standard_normal(shape)
                return (drawn * scale).astype(dtype)
            return random.integers(low, min(high, _LARGEST), shape).astype(dtype)

        yield signature, draw
