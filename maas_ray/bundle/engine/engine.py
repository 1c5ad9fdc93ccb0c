"""Runs a bundle's graph with onnxruntime, and knows how long a run takes. Knows no queue, no loop and no protocol."""

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
"""The stage of a load in which rows are run together and alone."""
_NODE_FAILED = "returned while running"
"""How onnxruntime begins when a node refuses what it is given: other sizes than it can combine, an impossible shape."""
_OURS = ("alloc", "out of memory", "CUDA", "CUDNN", "CUBLAS", "TensorRT", "terminate flag")
"""Words in the message of a node that failed for want of something that the machine has to give."""


class EngineSpec(Spec):
    """How one model version uses the machine."""

    threads: int = 1
    """Threads of one run; by default the replica's CPUs. More than the replica owns makes every run slower."""
    instances: PositiveInt = 1
    """Runs at the same time; they share the threads."""
    gpus: float = 0.0
    """GPUs that the replica owns; without any, only the CPU provider is tried."""
    warmup_rows: tuple[int, ...] = (1, 8)
    """Numbers of rows that are run before the version is ready, for a graph with a batch dimension."""
    warmup_runs: int = 3
    """Runs of each number of rows; the fastest seeds the latency estimate."""
    warmup_budget_s: float = 5.0
    """No further number of rows is begun after this time; larger ones are then estimated in proportion."""
    cuda_graph_rows: tuple[PositiveInt, ...] = ()
    """Numbers of rows to which batches are padded and captured as CUDA graphs; empty: none. See buckets.py, also for
    what has not been run on a GPU."""

    @model_validator(mode="after")
    def _one_stream_of_graphs(self) -> Self:
        if self.cuda_graph_rows and self.instances > 1:
            raise ValueError(
                f"cuda_graph_rows with {self.instances} instances: a captured graph has one set of buffers, use 1 stream"
            )
        return self


class Engine:
    """An onnxruntime session of one bundle; `run` is safe to call from as many threads as the spec has instances.

    Args:
        bundle: a verified bundle; its graph is inspected before onnxruntime sees it.
        spec: threads, GPUs and warm-up.
        skip: names of warm-up values that are not tried, and `probe` where rows are not probed.
        known: what an earlier load of the same bundle found: the graph is not analyzed and probed again.
        on_stage: is told `session` once there is one, then the name of each kind of warm-up values, then `probe`.

    Raises:
        BundleError: the graph is not servable, cannot be made into a session, or refuses the values that were recorded
            with it. A refusal of values that are made up is no error: there is no warm-up then.
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
        """Why rows of different requests do not share a run; empty where they do."""
        self.not_padded_because: str = ""
        """Why requests of different sizes do not, where the signature states a dimension for it."""
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
        """Whether rows alone do not say how large a run is."""
        self.is_bounded = self.hazards.is_value_bounded and not self.hazards.has_loops
        """Whether the sizes of a run decide how long it takes, not its values."""
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
        """Which values the first runs were made with; empty: the graph refuses all that were tried."""
        on_stage("session")
        self._warm_up(bundle, spec, skip, on_stage, known)
        if known is None:
            self._probe(bundle.id, PROBE not in skip and not self.hazards.can_trap, on_stage)
        padded = self.signature.padded
        self.padding: Padding | None = None if padded is None or self.not_padded_because else Padding(padded)
        """How requests of different sizes may share a run; None: they do not."""

    @property
    def can_merge(self) -> bool:
        """Whether rows of different requests may share a run."""
        return not self.not_merged_because

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
        return self.timed_run(inputs, _num_rows(inputs))[0]

    def timed_run(
        self, inputs: Mapping[str, Array], num_rows: int, stop: StopSignal | None = None
    ) -> tuple[dict[str, Array], float]:
        """As `run`, for who knows the number of rows and wants the seconds that it took.

        Args:
            inputs: as for `run`.
            num_rows: their rows.
            stop: ends the run early, at the next node of the graph; None: nothing does.

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
                raise RunStopped("the run was ended, since nobody waited for it any more") from error
            if _is_refusal(error):
                raise BadRequest(self._refusal(inputs)) from error
            raise EngineFailed(
                "the model failed while it ran on these inputs; the replica's log has the cause"
            ) from error
        run_s = time.perf_counter() - started
        self.latency.record(num_rows, run_s, form)
        return outputs, run_s

    def form_of(self, inputs: Mapping[str, Array]) -> Form:
        """The sizes of a run beyond its rows; nothing where no size is free."""
        return form_of(inputs, has_rows=self.signature.is_batched) if self.has_free_sizes else ()

    def _new_latency(self) -> LatencyModel | FormLatencies:
        return FormLatencies() if self.has_free_sizes else LatencyModel()

    def _run(self, inputs: Mapping[str, Array], num_rows: int, stop: StopSignal | None = None) -> dict[str, Array]:
        if self._buckets is not None and self._buckets.size_for(num_rows) is not None:
            return self._buckets.run(inputs, num_rows)
        options = self._options if stop is None else _stoppable(stop, self._options is not None)
        if self._has_bfloat16:
            return bfloat16.run(self._session, self.signature, inputs, options)
        # Measured against I/O binding: 5.8 against 9.0 to 15 microseconds for a tiny graph with buffers bound anew, 4.0
        # with buffers kept (and their rows copied in and out); for larger graphs this is never slower.
        feed = inputs if type(inputs) is dict else dict(inputs)
        try:
            results: Sequence[Array] = self._session.run(self._outputs, feed, options)
        except UnicodeError:  # strings that are no UTF-8, given or computed
            return strings.run(self._session, self._outputs, feed)
        return dict(zip(self._outputs, results, strict=True))

    def _refusal(self, inputs: Mapping[str, Array]) -> str:
        """Names the inputs that disagree on a size which they share by its name in the graph."""
        declared = {node.name: node.shape for node in self._session.get_inputs()}
        if clash := disagreement(declared, inputs):
            return f"the model refuses these values: {clash}; send equal sizes"
        return "the model refuses these values; compare shapes and values with the model's metadata"

    def _use_buckets(self, bundle_id: str, spec: EngineSpec) -> None:
        if self.providers[0] != CUDA:
            log.warning("bundle %s: no CUDA graphs, the graph runs on %s", bundle_id, self.providers[0])
        elif not can_be_fixed(self.signature):
            log.warning("bundle %s: no CUDA graphs, more than the number of rows varies, or it has strings", bundle_id)
        else:
            self._buckets = Buckets(self._session, self.signature, spec.cuda_graph_rows)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry(GRAPH_ID, "-1")

    def close(self) -> None:
        """Gives the session and its memory back, whoever still refers to this object; a run in progress ends first."""
        self._session = None

    def _warm_up(
        self,
        bundle: Bundle,
        spec: EngineSpec,
        skip: Collection[str],
        on_stage: Callable[[str], None],
        known: Nature | None,
    ) -> None:
        """First runs allocate and choose kernels; nobody should wait for them. A graph may refuse all values."""
        until = time.perf_counter() + spec.warmup_budget_s
        recorded = (
            [] if bundle.sample is None else [repeated(read_sample(bundle.sample, self.signature), self.signature)]
        )
        for guess in (*recorded, *guesses(self.signature)):
            if guess.name in skip or (known is not None and guess.name != known.warmed_with):
                continue
            on_stage(guess.name)
            try:
                self.latency = self._first_runs(guess, spec, until)  # forgets the cold runs
            except MaasError as error:
                if guess in recorded:
                    raise BundleError(
                        f"bundle {bundle.id} fails its warm-up run with the values that were recorded with it; give "
                        "others, or export it again"
                    ) from error
                log.info("bundle %s refuses %s: %s", bundle.id, guess.name, error.__cause__ or error)
                if time.perf_counter() > until:
                    break
            else:
                self.warmed_with = guess.name
                return
        log.warning("bundle %s: no warm-up, it refuses all values that were made up; give it a sample", bundle.id)

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
            self.not_padded_because = "values of ours could end the process, so it cannot be proven"
        else:
            _, self.not_padded_because = prove(self._run, self.signature)
        if self.not_padded_because:
            log.warning("bundle %s: requests are not padded: %s", bundle_id, self.not_padded_because)

    def _probed(self, bundle_id: str) -> str:
        """What speaks against merging although the graph was found to keep its rows apart; normally nothing."""
        difference = probe(self._run, self.signature).difference
        if difference:
            log.error(
                "bundle %s: %s, although no operator is known to mix rows; please report it", bundle_id, difference
            )
        return difference


def _analyzed(bundle: Bundle) -> tuple[Signature, str, Hazards]:
    model = inspect_graph(bundle.graph, bundle.info.signature)
    signature, verdict = judge(bundle.info.signature, model)
    return signature, verdict.reason, hazards_of(model)


def _session(bundle: Bundle, signature: Signature, spec: EngineSpec) -> ort.InferenceSession:
    options = session_options(max(1, spec.threads))
    # Spinning threads take the CPU away from the loop that feeds them.
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
            f"onnxruntime cannot make a session of bundle {bundle.id}: {str(error).splitlines()[0]}"
        ) from error
    if missing := [name for name, _ in chosen if name not in session.get_providers()]:
        log.warning("bundle %s: %s cannot be used on this machine; its libraries are missing", bundle.id, missing)
    session._model_bytes = None  # kept only to make the session again on other providers; doubles what a model takes
    return session


def _stoppable(stop: StopSignal, has_graphs: bool) -> ort.RunOptions:
    """Options of one run, which alone they may end: one that has just ended must not take the next one with it."""
    options = ort.RunOptions()
    if has_graphs:
        options.add_run_config_entry(GRAPH_ID, "-1")
    stop.tell(lambda: setattr(options, "terminate", True))
    return options


def _is_refusal(error: Exception) -> bool:
    """Whether it was the values: the nodes have run before, on blank rows, so one that fails now does not like these."""
    if isinstance(error, _REFUSED):
        return True
    text = str(error)
    return _NODE_FAILED in text and not any(word in text for word in _OURS)


def _num_rows(inputs: Mapping[str, Array]) -> int:
    for array in inputs.values():
        return int(array.shape[0]) if array.ndim else 1
    return 1
