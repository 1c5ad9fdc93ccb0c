"""Pads requests of different sizes to share a run, and removes the padding from their results. Independent of queues.

The model takes a mask that marks padding, and its signature states the padded dimension. Each load verifies with
`prove` that padding does not change the results.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from maas_ray.bundle.axis.compare import differs
from maas_ray.bundle.axis.probe import Run, value_kinds
from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import PaddedAxis, Signature

_LENGTHS = (3, 7, 5)
"""Sizes of the dimension in the verification; other variable dimensions are 4."""
_FREE = 4
_RTOL = 1e-2
"""Sums over more elements round differently; results that ignore the mask are rarely that close."""
_NUM_PROOFS = 3

Tensors = Mapping[str, Array]


class Padding:
    """The padding of a model's requests.

    Args:
        spec: the padded dimension in the signature.
    """

    def __init__(self, spec: PaddedAxis) -> None:
        self._spec = spec
        self._mask = spec.mask
        self._mask_axis = spec.inputs[spec.mask]
        self._inputs = spec.inputs
        self._outputs = spec.outputs

    def length(self, inputs: Tensors) -> int:
        """Size of the dimension in a request."""
        return int(inputs[self._mask].shape[self._mask_axis])

    def form(self, inputs: Tensors) -> tuple[tuple[int, ...], ...]:
        """Sizes other than rows that requests must have in common: the dimension counts as the next power of two.

        So a run is at most twice as long as each of its requests.
        """
        bound = 1 << max(0, self.length(inputs) - 1).bit_length()
        found = []
        for name, array in inputs.items():
            sizes, axis = array.shape, self._inputs.get(name)
            found.append(sizes[1:] if axis is None else (*sizes[1:axis], bound, *sizes[axis + 1 :]))
        return tuple(found)

    def agrees(self, inputs: Tensors) -> bool:
        """Whether the dimension has the same size in every input that has it."""
        length = self.length(inputs)
        return all(inputs[name].shape[axis] == length for name, axis in self._inputs.items())

    def merge(self, requests: Sequence[Tensors]) -> dict[str, Array]:
        """Concatenates the rows of all requests, padded to the longest."""
        longest = max(map(self.length, requests))
        merged: dict[str, Array] = {}
        for name in requests[0]:
            axis = self._inputs.get(name)
            parts = [request[name] for request in requests]
            if axis is not None:
                value = self._spec.values.get(name, "" if parts[0].dtype == object else 0)
                parts = [_padded(part, axis, longest, value) for part in parts]
            merged[name] = np.concatenate(parts)
        return merged

    def own(self, inputs: Tensors, outputs: Tensors, start: int, stop: int) -> dict[str, Array]:
        """The result of one request: its rows, without padding.

        Args:
            inputs: inputs of the request.
            outputs: outputs of the run.
            start: its first row in the run.
            stop: the row after its last one.
        """
        length = self.length(inputs)
        found: dict[str, Array] = {}
        for name, array in outputs.items():
            axis = self._outputs.get(name)
            rows = slice(start, stop)
            found[name] = array[rows] if axis is None else array[(rows, *[slice(None)] * (axis - 1), slice(length))]
        return found


def prove(run: Run, signature: Signature) -> tuple[Padding | None, str]:
    """Compares padded rows with the same rows alone.

    Args:
        run: runs the graph, whose rows were found to be independent.
        signature: signature with or without a padded dimension.

    Returns:
        The padding, or None and the reason; an empty reason if the signature states no padded dimension.
    """
    if signature.padded is None:
        return None, ""
    padding = Padding(signature.padded)
    num_shown, refusal = 0, ""
    for requests in _requests(signature, signature.padded):
        try:
            alone = [run(request, 1) for request in requests]
            together = run(padding.merge(requests), len(requests))
        except Exception as error:  # the graph may accept other values
            refusal = str(error).splitlines()[0] if str(error) else type(error).__name__
            continue
        for place, (request, right) in enumerate(zip(requests, alone, strict=True)):
            own = padding.own(request, together, place, place + 1)
            for name, array in right.items():
                if own[name].shape != array.shape:
                    return (
                        None,
                        f"output {name!r} has the shape {list(own[name].shape)} padded and {list(array.shape)} alone",
                    )
                if differs(own[name], array, _RTOL):
                    return None, f"output {name!r} differs between a padded row and the row alone"
        num_shown += 1
        if num_shown == _NUM_PROOFS:
            return padding, ""
    if not num_shown:
        return None, f"the graph rejects the rows for the verification of padding ({refusal})"
    return padding, ""


def _requests(signature: Signature, spec: PaddedAxis) -> Iterator[list[dict[str, Array]]]:
    """Rows of different lengths, their masks set."""
    for _, draw in value_kinds(signature, seed=1):
        requests = []
        for length in _LENGTHS:
            request = {}
            for tensor in signature.required:
                axis = spec.inputs.get(tensor.name)
                sizes = [1, *(_FREE if size == -1 else size for size in tensor.shape[1:])]
                if axis is not None:
                    sizes[axis] = length
                request[tensor.name] = draw(tensor, tuple(sizes))
            mask = request[spec.mask]
            request[spec.mask] = np.ones(mask.shape, mask.dtype)
            requests.append(request)
        yield requests


def _padded(array: Array, axis: int, length: int, value: float | str) -> Array:
    missing = length - array.shape[axis]
    if not missing:
        return array
    sizes = list(array.shape)
    sizes[axis] = missing
    filling: Array = np.full(sizes, value, dtype=array.dtype)
    joined: Array = np.concatenate([array, filling], axis)
    return joined
