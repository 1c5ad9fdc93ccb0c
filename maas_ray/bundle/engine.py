"""Runs a bundle's graph with onnxruntime, and knows how long a run takes. Knows no queue, no loop and no protocol."""

import logging
import time
from collections.abc import Mapping, Sequence

import numpy as np
import onnxruntime as ort

from maas_ray.bundle.datatypes import NUMPY, Array
from maas_ray.bundle.format import Bundle, Signature, TensorSpec
from maas_ray.bundle.inspect import inspect_graph
from maas_ray.bundle.latency import LatencyModel
from maas_ray.errors import BadRequest, BundleError, EngineFailed, MaasError
from maas_ray.spec import Spec

log = logging.getLogger(__name__)

PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
_REFUSED = (ort.capi.onnxruntime_pybind11_state.InvalidArgument,)


class EngineSpec(Spec):
    """How one model version uses the machine."""

    threads: int = 1
    """Threads of one run; by default the replica's CPUs. More than the replica owns makes every run slower."""
    streams: int = 1
    """Runs at the same time; they share the threads."""
    gpus: float = 0.0
    """GPUs that the replica owns; without any, only the CPU provider is tried."""
    warmup_rows: tuple[int, ...] = (1, 8)
    """Numbers of rows that are run before the version is ready, for a graph with a batch dimension."""
    warmup_runs: int = 3
    """Runs of each number of rows; the fastest seeds the latency estimate."""
    warmup_budget_s: float = 5.0
    """No further number of rows is begun after this time; larger ones are then estimated in proportion."""


class Engine:
    """An onnxruntime session of one bundle; `run` is safe to call from any one thread at a time.

    Args:
        bundle: a verified bundle; its graph is inspected before onnxruntime sees it.
        spec: threads, GPUs and warm-up.

    Raises:
        BundleError: the graph is not servable, cannot be made into a session, or fails its warm-up.
    """

    def __init__(self, bundle: Bundle, spec: EngineSpec | None = None) -> None:
        spec = spec or EngineSpec()
        inspect_graph(bundle.graph, bundle.info.signature)
        self.signature: Signature = bundle.info.signature
        self.latency = LatencyModel()
        self.streams = spec.streams
        self._outputs = [tensor.name for tensor in self.signature.outputs]
        self._session = _session(bundle, spec)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._warm_up(bundle.id, spec)
        self.can_merge: bool = self.signature.is_batched and self._keeps_rows_apart(bundle.id)
        """Whether rows of different requests may share a run."""

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph once.

        Args:
            inputs: every input of the signature, of its dtype; BYTES as object arrays of `str`.

        Returns:
            Every output by name; freshly allocated, so that the caller may keep or change it.

        Raises:
            BadRequest: the graph refuses these values (for instance an index outside its table).
            EngineFailed: the run failed for another reason; the cause is chained.
        """
        started = time.perf_counter()
        try:
            results: Sequence[Array] = self._session.run(self._outputs, dict(inputs))
        except _REFUSED as error:
            raise BadRequest(
                "the model refuses these values; compare shapes and values with the model's metadata"
            ) from error
        except Exception as error:  # onnxruntime's classes have no common base
            raise EngineFailed(
                "the model failed while it ran on these inputs; the replica's log has the cause"
            ) from error
        self.latency.record(_num_rows(inputs), time.perf_counter() - started)
        return dict(zip(self._outputs, results, strict=True))

    def close(self) -> None:
        """Gives the session and its memory back, whoever still refers to this object; a run in progress ends first."""
        self._session = None

    def _warm_up(self, bundle_id: str, spec: EngineSpec) -> None:
        """First runs allocate and choose kernels; nobody should wait for them."""
        sizes = sorted(set(spec.warmup_rows)) if self.signature.is_batched else [1]
        free = [t.name for t in self.signature.inputs if -1 in (t.shape[1:] if self.signature.is_batched else t.shape)]
        measured = LatencyModel()
        until = time.perf_counter() + spec.warmup_budget_s
        for num_rows in sizes:
            if time.perf_counter() > until:
                break
            inputs = {tensor.name: _blank(tensor, num_rows) for tensor in self.signature.inputs}
            times = []
            for _ in range(spec.warmup_runs):
                started = time.perf_counter()
                try:
                    self.run(inputs)
                except MaasError as error:
                    if free:  # the sizes tried are ours, so a refusal says nothing about real requests
                        log.warning("bundle %s: no warm-up, blank inputs %s are refused: %s", bundle_id, free, error)
                        return
                    raise BundleError(
                        f"bundle {bundle_id} fails its warm-up run with {num_rows} blank rows; export it again"
                    ) from error
                times.append(time.perf_counter() - started)
            measured.record(num_rows, min(times))
        self.latency = measured  # forgets the cold runs

    def _keeps_rows_apart(self, bundle_id: str) -> bool:
        """Whether three random rows give alone what they give together: a graph may compute over the batch dimension.

        Merging requests in such a graph would let one caller's rows change another's answer.
        """
        inputs = {tensor.name: _sample(tensor, 3) for tensor in self.signature.inputs}
        try:
            together = self.run(inputs)
            alone = [self.run({name: array[row : row + 1] for name, array in inputs.items()}) for row in range(3)]
        except MaasError as error:
            log.warning("bundle %s: random rows are refused, so requests are not merged: %s", bundle_id, error)
            return False
        # Where there are scores, a class beside them says nothing more, and may flip at a tie by rounding alone.
        floats = {name: array for name, array in together.items() if array.dtype.kind == "f"}
        for name, array in (floats or together).items():
            parts = [outputs[name] for outputs in alone]
            if any(part.shape != (1, *array.shape[1:]) for part in parts) or not _is_close(
                array, np.concatenate(parts)
            ):
                log.warning("bundle %s: output %r mixes its rows, so requests are not merged", bundle_id, name)
                return False
        return True


def _session(bundle: Bundle, spec: EngineSpec) -> ort.InferenceSession:
    options = ort.SessionOptions()
    # Explicit: onnxruntime ignores OMP_NUM_THREADS and would take every core of the machine for each session.
    options.intra_op_num_threads = max(1, spec.threads)
    options.inter_op_num_threads = 1
    # Spinning threads take the CPU away from the loop that feeds them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 4  # a refused row is the caller's news, not a line in our log per request
    chosen = _providers(spec.gpus)
    try:
        session = ort.InferenceSession(bundle.graph, options, providers=chosen)
    except Exception as error:
        raise BundleError(
            f"onnxruntime cannot make a session of bundle {bundle.id}: {str(error).splitlines()[0]}"
        ) from error
    session._model_bytes = None  # kept only to make the session again on other providers; doubles what a model takes
    return session


def _providers(gpus: float) -> list[str]:
    available = ort.get_available_providers()
    if gpus <= 0:
        log.info("execution provider: CPU, because the replica owns no GPU")
        return ["CPUExecutionProvider"]
    chosen = [provider for provider in PROVIDERS if provider in available]
    log.info("execution providers, first that works: %s (the replica owns %s GPUs)", ", ".join(chosen), gpus)
    return chosen


def _num_rows(inputs: Mapping[str, Array]) -> int:
    for array in inputs.values():
        return int(array.shape[0]) if array.ndim else 1
    return 1


def _blank(tensor: TensorSpec, num_rows: int) -> Array:
    shape = [num_rows if not axis and size == -1 else max(size, 1) for axis, size in enumerate(tensor.shape)]
    if tensor.datatype == "BYTES":
        return np.full(shape, "", dtype=object)
    return np.zeros(shape, dtype=NUMPY[tensor.datatype])


def _sample(tensor: TensorSpec, num_rows: int) -> Array:
    """Random floats between 0 and 1 (the same at every load); blanks for everything else, which any table can hold."""
    array = _blank(tensor, num_rows)
    if array.dtype.kind == "f":
        return np.random.default_rng(0).random(array.shape).astype(array.dtype)
    return array


def _is_close(first: Array, second: Array) -> bool:
    if first.shape != second.shape:
        return False
    if first.dtype.kind != "f":
        return bool((first == second).all())
    # Kernels for different batch sizes round differently; mixing is orders of magnitude larger.
    return bool(np.allclose(first, second, rtol=1e-2, atol=1e-3, equal_nan=True))
