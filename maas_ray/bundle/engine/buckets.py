"""Runs with fixed sizes in fixed buffers, as CUDA graphs need them. Independent of queues and warm-up.

A CUDA graph repeats the same kernels on the same addresses: the kernel launches, which take most of a small model's
time on a GPU, become one. So a batch is padded to the next bucket, copied into that bucket's device buffers, run with
I/O binding under the bucket's graph id, and its padding is removed.

**Not tested on a GPU.** The tests run this module on CPU buffers (padding, removal of padding, isolation of rows, reuse
of buffers); that onnxruntime captures and replays graphs is taken from its documentation
(https://onnxruntime.ai/docs/execution-providers/CUDA-ExecutionProvider.html, "Using CUDA Graphs").
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Signature

GRAPH_ID = "gpu_graph_id"
"""Run option: runs with one id share a captured graph; -1 disables capturing."""


def can_be_fixed(signature: Signature) -> bool:
    """Whether only the number of rows varies, and every tensor can be on a device."""
    tensors = (*signature.inputs, *signature.outputs)
    has_optional = len(signature.required) < len(signature.inputs)
    return (
        signature.is_batched
        and not has_optional
        and not any(-1 in t.shape[1:] or t.datatype in ("BYTES", "BF16") for t in tensors)
    )


class Buckets:
    """The buckets of one session; one run at a time.

    Args:
        session: session of a graph for which `can_be_fixed` is true.
        signature: signature of the graph.
        sizes: numbers of rows.
        device: `cuda`, or `cpu` in tests.
    """

    def __init__(
        self, session: ort.InferenceSession, signature: Signature, sizes: Sequence[int], device: str = "cuda"
    ) -> None:
        self.sizes = sorted(set(sizes))
        self._session = session
        self._signature = signature
        self._device = device
        self._buffers: dict[int, _BoundBuffers] = {}

    def size_for(self, num_rows: int) -> int | None:
        """The smallest bucket for `num_rows` rows; None: there are more rows than in the largest bucket."""
        place = bisect_left(self.sizes, num_rows)
        return self.sizes[place] if place < len(self.sizes) else None

    def run(self, inputs: Mapping[str, Array], num_rows: int) -> dict[str, Array]:
        """Runs in the smallest bucket; the first run of a bucket allocates its buffers (and, on a GPU, captures).

        Args:
            inputs: every input of the signature, `num_rows` rows each.
            num_rows: at most the largest bucket.

        Returns:
            Every output, `num_rows` rows each, as copies.

        Raises:
            ValueError: there are more rows than in the largest bucket.
        """
        size = self.size_for(num_rows)
        if size is None:
            raise ValueError(f"{num_rows} rows exceed the largest bucket, {self.sizes[-1]}")
        buffers = self._buffers.get(size)
        if buffers is None:
            graph_id = 1 + self.sizes.index(size)
            buffers = self._buffers[size] = _BoundBuffers(self._session, self._signature, size, graph_id, self._device)
        return buffers.run(inputs, num_rows)


class _BoundBuffers:
    """Buffers of one bucket: staging on the host, tensors on the device, bound once."""

    def __init__(
        self, session: ort.InferenceSession, signature: Signature, size: int, graph_id: int, device: str
    ) -> None:
        self._session = session
        self._options = ort.RunOptions()
        if device == "cuda":
            self._options.add_run_config_entry(GRAPH_ID, str(graph_id))
        self._binding = session.io_binding()
        self._staging: dict[str, Array] = {}
        self._inputs: dict[str, ort.OrtValue] = {}
        self._outputs: dict[str, ort.OrtValue] = {}
        for tensor in signature.inputs:
            shape = (size, *tensor.shape[1:])
            self._staging[tensor.name] = np.zeros(shape, NUMPY[tensor.datatype])
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, NUMPY[tensor.datatype], device, 0)
            self._inputs[tensor.name] = value
            self._binding.bind_ortvalue_input(tensor.name, value)
        for tensor in signature.outputs:
            shape = (size, *tensor.shape[1:])
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, NUMPY[tensor.datatype], device, 0)
            self._outputs[tensor.name] = value
            self._binding.bind_ortvalue_output(tensor.name, value)

    def run(self, inputs: Mapping[str, Array], num_rows: int) -> dict[str, Array]:
        for name, staging in self._staging.items():
            staging[:num_rows] = inputs[name]
            staging[num_rows:] = 0  # never rows of an earlier caller: they could make this run fail
            self._inputs[name].update_inplace(staging)
        self._binding.synchronize_inputs()
        self._session.run_with_iobinding(self._binding, self._options)
        self._binding.synchronize_outputs()
        # A copy: on the host `numpy` may be a view of the buffer, which the next run overwrites.
        return {name: np.array(value.numpy()[:num_rows]) for name, value in self._outputs.items()}
