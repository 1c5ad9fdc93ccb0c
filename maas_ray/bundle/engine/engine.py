"""Runs a bundle's graph with onnxruntime, and estimates run times. Independent of queues, event loops and protocols."""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Self

import onnxruntime as ort
from pydantic import PositiveInt, model_validator

from maas_ray.bundle import bfloat16, strings
from maas_ray.bundle.axis.judge import judge
from maas_ray.bundle.axis.probe import probe
from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.buckets import GRAPH_ID, Buckets, can_be_fixed
from maas_ray.bundle.engine.forms import Form, FormLatencies, form_of, has_free_sizes
from maas_ray.bundle.engine.latency import LatencyModel
from maas_ray.bundle.engine.padding import Padding, prove
from maas_ray.bundle.engine.providers import CUDA, choose_providers
from maas_ray.bundle.engine.stop import StopSignal
from maas_ray.bundle.engine.warmup import Guess, guesses, repeated
from maas_ray.bundle.format import Bundle, Signature
from maas_ray.bundle.graph.checks import inspect_graph
from maas_ray.bundle.graph.hazards import Hazards, hazards_of
from maas_ray.bundle.graph.named_sizes import disagreement
from maas_ray.bundle.nature import Nature
from maas_ray.bundle.sample import read_sample
from maas_ray.bundle.sessions import session_options
from maas_ray.display import get_logger
from maas_ray.errors import BadRequest, BundleError, EngineFailed, MaasError, RunStopped
from maas_ray.spec import Spec

log = get_logger(__name__)

_REFUSED = (ort.capi.onnxruntime_pybind11_state.InvalidArgument,)
PROBE = "probe"
"""Name of the load stage in which rows are run together and alone."""
_NODE_FAILED = "returned while running"
"""Prefix of onnxruntime's message when a node rejects its inputs: incompatible sizes, an impossible shape."""
_OURS = ("alloc", "out of memory", "CUDA", "CUDNN", "CUBLAS", "TensorRT", "terminate flag")
"""Words in the message of a node that failed because of missing resources of the machine."""


class EngineSpec(Spec):
    """Resources of one model version."""

    threads: int = 1
    """Threads per run; by default the replica's CPUs. More threads than the replica's CPUs make every run slower."""
    instances: PositiveInt = 1
    """Number of concurrent runs; they share the threads."""
    gpus: float = 0.0
    """GPUs of the replica; without GPUs, only the CPU provider is used."""
    warmup_rows: tuple[int, ...] = (1, 8)
    """Numbers of rows of the warm-up runs, for a graph with a batch dimension."""
    warmup_runs: int = 3
    """Warm-up runs per number of rows; the fastest seeds the latency estimate."""
    warmup_budget_s: float = 5.0
    """Time after which no further number of rows is started; larger numbers are then estimated proportionally."""
    cuda_graph_rows: tuple[PositiveInt, ...] = ()
    """Numbers of rows to which batches are padded and captured as CUDA graphs; empty: no CUDA graphs. Not tested on a
    GPU, see buckets.py."""

    @model_validator(mode="after")
    def _one_stream_of_graphs(self) -> Self:
        if self.cuda_graph_rows and self.instances > 1:
            raise ValueError(
                f"cuda_graph_rows needs 1 instance, because a captured graph has one set of buffers; there are "
                f"{self.instances} instances: set instances to 1, or remove cuda_graph_rows"
            )
        return self


class Engine:
    """An onnxruntime session of one bundle; `run` is safe to call from as many threads as the spec has instances.

    Args:
        bundle: a verified bundle; its graph is inspected before onnxruntime sees it.
        spec: threads, GPUs and warm-up.
        skip: names of warm-up values to skip, and `probe` to skip probing rows.
        known: result of an earlier load of the same bundle, so that the graph is not analyzed and probed again.
        on_stage: called with `session` once it exists, then the name of each kind of warm-up values, then `probe`.

    Raises:
        BundleError: the graph is not servable, cannot be loaded into a session, or rejects its recorded values. A
            rejection of synthetic values is not an error: there is then no warm-up.
    """

    def __init__(
        self,
        bundle: Bundle,
        spec: EngineSpec | None = None,
        *,
        skip: Collection[str] = (),
        known: Nature | None = None,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> None:
        spec = spec or EngineSpec()
        self.signature: Signature
        self.not_merged_because: str
        """Reason why rows of different requests do not share a run; empty if they do."""
        self.not_padded_because: str = ""
        """Reason why requests of different sizes do not share a run, if the signature states a padded dimension."""
        if known is None:
            self.signature, self.not_merged_because, self.hazards = _analyzed(bundle)
        else:
            self.signature, self.not_merged_because, self.hazards = (
                known.signature,
                known.not_merged_because,
                known.hazards,
            )
            self.not_padded_because = known.not_padded_because
        self.has_free_sizes = has_free_sizes(self.signature)
        """Whether the size of a run depends on more than the number of rows."""
        self.is_bounded = self.hazards.is_value_bounded and not self.hazards.has_loops
        """Whether the duration of a run depends on its sizes only, not on its values."""
        self.latency = self._new_latency()
        self.instances = spec.instances
        self.threads = max(1, spec.threads)
        self._outputs = [tensor.name for tensor in self.signature.outputs]
        self._session = _session(bundle, self.signature, spec)
        self.providers: tuple[str, ...] = tuple(self._session.get_providers())
        self._has_bfloat16 = bfloat16.is_in(self.signature)
        self._options: ort.RunOptions | None = None
        self._buckets: Buckets | None = None
        if spec.cuda_graph_rows:
            self._use_buckets(bundle.id, spec)
        self.warmed_with = ""
        """Name of the values of the first runs; empty: the graph rejects all tried values."""
        on_stage("session")
        self._warm_up(bundle, spec, skip, on_stage, known)
        if known is None:
            self._probe(bundle.id, PROBE not in skip and not self.hazards.can_trap, on_stage)
        padded = self.signature.padded
        self.padding: Padding | None = None if padded is None or self.not_padded_because else Padding(padded)
        """Padding by which requests of different sizes share a run; None: they do not."""

    @property
    def can_merge(self) -> bool:
        """Whether rows of different requests may share a run."""
        return not self.not_merged_because

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs the graph once.

        Args:
            inputs: every input of the signature, with its dtype; BYTES as object arrays of `str`.

        Returns:
            Every output by name; freshly allocated, so that the caller may keep or change it.

        Raises:
            BadRequest: the graph rejects these values (for instance an index outside its table).
            EngineFailed: the run failed for another reason; the cause is chained.
        """
        return self.timed_run(inputs, _num_rows(inputs))[0]

    def timed_run(
        self, inputs: Mapping[str, Array], num_rows: int, stop: StopSignal | None = None
    ) -> tuple[dict[str, Array], float]:
        """As `run`, for a known number of rows; also returns the seconds of the run.

        Args:
            inputs: as for `run`.
            num_rows: number of rows.
            stop: signal to stop the run early, at the next node of the graph; None: no signal.

        Raises:
            RunStopped: `stop` was set.
            MaasError: as `run`.
        """
        form = self.form_of(inputs) if self.has_free_sizes else ()
        started = time.perf_counter()
        try:
            outputs = self._run(inputs, num_rows, stop)
        except MaasError:
            raise
        except Exception as error:  # onnxruntime's classes have no common base
            if stop is not None and stop.is_set:
                run_s = time.perf_counter() - started
                if run_s > self.latency.estimate_s(num_rows, form):  # it would have taken at least as long
                    self.latency.record(num_rows, run_s, form)
                raise RunStopped("the run was canceled") from error
            if _is_refusal(error):
                raise BadRequest(self._refusal(inputs)) from error
            raise EngineFailed(
                "the model failed while it ran on these inputs; see the replica's log for the cause"
            ) from error
        run_s = time.perf_counter() - started
        self.latency.record(num_rows, run_s, form)
        return outputs, run_s

    def form_of(self, inputs: Mapping[str, Array]) -> Form:
        """The sizes of a run other than its rows; empty if no size is free."""
        return form_of(inputs, has_rows=self.signature.is_batched) if self.has_free_sizes else ()

    def _new_latency(self) -> LatencyModel | FormLatencies:
        return FormLatencies() if self.has_free_sizes else LatencyModel()

    def _run(self, inputs: Mapping[str, Array], num_rows: int, stop: StopSignal | None = None) -> dict[str, Array]:
        if self._buckets is not None and self._buckets.size_for(num_rows) is not None:
            return self._buckets.run(inputs, num_rows)
        options = self._options if stop is None else _stoppable(stop, self._options is not None)
        if self._has_bfloat16:
            return bfloat16.run(self._session, self.signature, inputs, options)
        # Measured against I/O binding: 5.8 against 9.0 to 15 microseconds for a tiny graph with rebound buffers, 4.0
        # with buffers kept (and their rows copied in and out); for larger graphs this is never slower.
        feed = inputs if type(inputs) is dict else dict(inputs)
        try:
            results: Sequence[Array] = self._session.run(self._outputs, feed, options)
        except UnicodeError:  # input or output strings that are not UTF-8
            return strings.run(self._session, self._outputs, feed)
        return dict(zip(self._outputs, results, strict=True))

    def _refusal(self, inputs: Mapping[str, Array]) -> str:
        """Names inputs that differ in a size that the graph declares equal by name."""
        declared = {node.name: node.shape for node in self._session.get_inputs()}
        if clash := disagreement(declared, inputs):
            return f"the model rejects these values: {clash}; send equal sizes"
        return "the model rejects these values; compare shapes and values with the model's metadata"

    def _use_buckets(self, bundle_id: str, spec: EngineSpec) -> None:
        if self.providers[0] != CUDA:
            log.warning("bundle %s: no CUDA graphs, because the graph runs on %s", bundle_id, self.providers[0])
        elif not can_be_fixed(self.signature):
            log.warning("bundle %s: no CUDA graphs, because it has free sizes other than rows, or strings", bundle_id)
        else:
            self._buckets = Buckets(self._session, self.signature, spec.cuda_graph_rows)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(GRAPH_ID, "-1")

    def close(self) -> None:
        """Releases the session and its memory, even if this object is still referenced; waits for a run in progress."""
        self._session = None

    def _warm_up(
        self,
        bundle: Bundle,
        spec: EngineSpec,
        skip: Collection[str],
        on_stage: Callable[[str], None],
        known: Nature | None,
    ) -> None:
        """Executes the first runs before requests: they allocate and select kernels. A graph may reject all values."""
        until = time.perf_counter() + spec.warmup_budget_s
        recorded = (
            [] if bundle.sample is None else [repeated(read_sample(bundle.sample, self.signature), self.signature)]
        )
        for guess in (*recorded, *guesses(self.signature)):
            if guess.name in skip or (known is not None and guess.name != known.warmed_with):
                continue
            on_stage(guess.name)
            try:
                self.latency = self._first_runs(guess, spec, until)  # discards the cold runs
            except MaasError as error:
                if guess in recorded:
                    raise BundleError(
                        f"bundle {bundle.id} fails its warm-up run with its recorded values; give another sample, or "
                        "export it again"
                    ) from error
                log.info("bundle %s rejects %s: %s", bundle.id, guess.name, error.__cause__ or error)
                if time.perf_counter() > until:
                    break
            else:
                self.warmed_with = guess.name
                return
        log.warning(
            "bundle %s: no warm-up, because it rejects all synthetic values; import it with a sample", bundle.id
        )

    def _first_runs(self, guess: Guess, spec: EngineSpec, until: float) -> LatencyModel | FormLatencies:
        measured = self._new_latency()
        sizes = sorted({*spec.warmup_rows, *spec.cuda_graph_rows}) if self.signature.is_batched else [1]
        for num_rows in sizes:
            if num_rows != sizes[0] and time.perf_counter() > until:
                break
            inputs = guess.values(num_rows)
            times = []
            for _ in range(spec.warmup_runs):
                started = time.perf_counter()
                self.run(inputs)
                times.append(time.perf_counter() - started)
            if times:
                measured.record(num_rows, min(times), self.form_of(inputs))
        return measured

    def _probe(self, bundle_id: str, can_run: bool, on_stage: Callable[[str], None]) -> None:
        if self.can_merge and can_run:
            on_stage(PROBE)
            self.not_merged_because = self._probed(bundle_id)
        if self.signature.padded is None:
            return
        on_stage(PROBE)
        if not self.can_merge:
            self.not_padded_because = self.not_merged_because
        elif not can_run:
            self.not_padded_because = "it cannot be verified, because synthetic values could crash the process"
        else:
            _, self.not_padded_because = prove(self._run, self.signature)
        if self.not_padded_because:
            log.warning("bundle %s: requests are not padded: %s", bundle_id, self.not_padded_because)

    def _probed(self, bundle_id: str) -> str:
        """A measured difference that prevents merging although the analysis found independent rows; normally empty."""
        difference = probe(self._run, self.signature).difference
        if difference:
            log.error(
                "bundle %s: %s, although no operator is known to mix rows; please report this", bundle_id, difference
            )
        return difference


def _analyzed(bundle: Bundle) -> tuple[Signature, str, Hazards]:
    model = inspect_graph(bundle.graph, bundle.info.signature)
    signature, verdict = judge(bundle.info.signature, model)
    return signature, verdict.reason, hazards_of(model)


def _session(bundle: Bundle, signature: Signature, spec: EngineSpec) -> ort.InferenceSession:
    options = session_options(max(1, spec.threads))
    # Spinning threads would take CPU time from the event loop that feeds them.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    chosen = choose_providers(
        spec.gpus,
        ort.get_available_providers(),
        signature,
        max(spec.warmup_rows, default=1),
        bool(spec.cuda_graph_rows),
    )
    try:
        session = ort.InferenceSession(bundle.graph, options, providers=chosen)
    except Exception as error:
        raise BundleError(
            f"onnxruntime cannot load bundle {bundle.id}: {str(error).splitlines()[0]}; export it again"
        ) from error
    if missing := [name for name, _ in chosen if name not in session.get_providers()]:
        log.warning(
            "bundle %s: %s cannot be used on this machine, because its libraries are missing", bundle.id, missing
        )
    session._model_bytes = None  # kept only to recreate the session on other providers; doubles a model's memory
    return session


def _stoppable(stop: StopSignal, has_graphs: bool) -> ort.RunOptions:
    """Options of one run, so that a late stop signal cannot stop the next run."""
    options = ort.RunOptions()
    if has_graphs:
        options.add_run_config_entry(GRAPH_ID, "-1")
    stop.tell(lambda: setattr(options, "terminate", True))
    return options


def _is_refusal(error: Exception) -> bool:
    """Whether the values caused the error: the nodes have run before on other values, so these values made one fail."""
    if isinstance(error, _REFUSED):
        return True
    text = str(error)
    return _NODE_FAILED in text and not any(word in text for word in _OURS)


def _num_rows(inputs: Mapping[str, Array]) -> int:
    for array in inputs.values():
        return int(array.shape[0]) if array.ndim else 1
    return 1
