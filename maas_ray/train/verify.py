"""Verifies that a model trains the same on every layout: in float64, from the same weights, on the same global batches.

Rounding in float32 would hide a wrongly scaled gradient of one layer. In float64 layouts agree to twelve digits, and a
difference is an error of the plan, the model, this library or torch.
"""

import math
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import ProcessException, start_processes

from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.errors import ModelError
from maas_ray.spec import canonical_json
from maas_ray.store.objects import open_store
from maas_ray.train.loop.assemble import build_loader, build_net, build_plan, build_train_state, count_class_rows
from maas_ray.train.loop.deterministic import use_deterministic_kernels
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.parallel.pipeline import num_layers
from maas_ray.train.spec.parallelism import MeshLayout, possible_layouts
from maas_ray.train.spec.performance import PerformanceSpec
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.state.restore import tensors_of

TOLERANCE = 1e-8
"""Largest difference of a loss, a gradient norm or a parameter that counts as equal."""
_NO_LIMIT = 1e300
"""Clipping norm that is never reached; the norm is still measured."""
TIMEOUT_S = 120.0
"""Timeout of a collective operation, so that the comparison cannot hang."""


@dataclass(frozen=True)
class Compared:
    """The largest differences between one layout and one process over all steps."""

    layout: str
    loss: float = math.nan
    gradient_norm: float = math.nan
    parameters: float = math.nan
    refused: str | None = None
    """Reason why the model does not support the layout, which then counts neither as equal nor as different."""
    error: str | None = None
    """Error of a rank that ended the training on the layout, which then counts as different."""

    @property
    def is_equal(self) -> bool:
        """Whether no difference exceeds the tolerance or is NaN."""
        return all(value <= TOLERANCE for value in (self.loss, self.gradient_norm, self.parameters))


@dataclass(frozen=True)
class _Failed:
    """The error that ended the training on a layout."""

    error: str


@dataclass(frozen=True)
class _Trace:
    losses: list[float]
    norms: list[float]
    parameters: dict[str, Tensor]


def layouts_for(spec: TrainSpec, dataset: Dataset, max_world: int) -> list[MeshLayout]:
    """The layouts of this model with at most `max_world` ranks."""
    net = build_net(spec, dataset.features)
    plan = spec.parallelism.tp_plan or getattr(net, "tp_plan", None) or {}
    layouts = possible_layouts(
        max_world, has_plan=bool(plan), num_layers=num_layers(net), has_sequence="sequence_parallel" in plan.values()
    )
    return [layout for layout in layouts if layout.dp <= spec.batch.global_size]


def verify_layouts(
    spec: TrainSpec,
    data_digest: str,
    layouts: Sequence[MeshLayout],
    *,
    steps: int = 4,
    on_compared: Callable[[Compared], None] | None = None,
) -> list[Compared]:
    """Trains the model of a spec for a few steps in one process and on each layout, and compares the results.

    The ranks are processes on this machine with gloo; no GPU is used.

    Args:
        spec: the run. Its layout and precision are ignored, dropout, clipping and penalties are used, and `performance`
            is used on the layouts only.
        data_digest: the prepared data set in the spec's store.
        layouts: the layouts to compare, in any order.
        steps: number of optimizer steps, from the start of the run.
        on_compared: called with each result as soon as it is known.

    Raises:
        MaasError: the model cannot be trained in one process.
    """
    spec = spec.model_copy(update={"precision": "fp32", "max_grad_norm": spec.max_grad_norm or _NO_LIMIT})
    # The reference keeps all activations and compiles nothing; the layouts use the performance settings of the spec.
    plain = spec.model_copy(update={"performance": PerformanceSpec()})
    reference = _trace(plain, data_digest, MeshLayout(), steps)
    if isinstance(reference, str):
        raise ModelError(reference)
    compared = []
    for world in sorted({layout.world for layout in layouts}):
        for layout, trace in _run(spec, data_digest, steps, [layout for layout in layouts if layout.world == world]):
            compared.append(_compare(layout, reference, trace))
            if on_compared is not None:
                on_compared(compared[-1])
    return compared


def _compare(layout: MeshLayout, reference: _Trace, trace: "_Trace | _Failed | str") -> Compared:
    if isinstance(trace, str):
        return Compared(str(layout), refused=trace)
    if isinstance(trace, _Failed):
        return Compared(str(layout), error=trace.error)
    return Compared(
        str(layout),
        loss=_largest(reference.losses, trace.losses),
        gradient_norm=_largest(reference.norms, trace.norms),
        parameters=max(
            (float((value - trace.parameters[name]).abs().max()) for name, value in reference.parameters.items()),
            default=0.0,
        )
        if reference.parameters.keys() == trace.parameters.keys()
        else math.inf,
    )


def _largest(first: Sequence[float], second: Sequence[float]) -> float:
    return max(abs(one - other) for one, other in zip(first, second, strict=True))


def _run(
    spec: TrainSpec, data_digest: str, steps: int, layouts: Sequence[MeshLayout]
) -> Iterator[tuple[MeshLayout, "_Trace | _Failed | str"]]:
    """Runs all layouts with the same number of ranks, in one group of processes; a new group after a failure."""
    left = list(layouts)
    while left:
        with tempfile.TemporaryDirectory(prefix="maas-verify-") as scratch:
            directory = Path(scratch)
            error = _run_group(spec, data_digest, steps, left, directory)
            done = next((i for i, layout in enumerate(left) if not _is_complete(directory, i, layout)), len(left))
            if error is not None:
                done = min(done, len(left) - 1)  # a failure after the last result belongs to the last layout
            for number in range(done):
                yield left[number], _read(directory, number)
        if error is not None:
            yield left[done], _Failed(error)
        left = left[done + 1 :]


def _run_group(
    spec: TrainSpec, data_digest: str, steps: int, layouts: Sequence[MeshLayout], directory: Path
) -> str | None:
    """Runs layouts one after another in one group of processes; returns the error that ended it, or None."""
    # Forked from one process that has imported everything, including what optimizers import at their first use.
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    document = canonical_json(spec.model_dump(mode="json"))
    world = layouts[0].world
    try:
        start_processes(  # type: ignore[no-untyped-call]
            _rank,
            (world, TIMEOUT_S, str(directory), document, data_digest, steps, list(layouts)),
            nprocs=world,
            start_method="forkserver",
        )
    except ProcessException as error:
        return str(error).strip().splitlines()[-1]
    return None


def _is_complete(directory: Path, number: int, layout: MeshLayout) -> bool:
    """Whether all ranks have written their outcome of a layout."""
    return len(list(directory.glob(f"{number}-*"))) == layout.world


def _rank(
    rank: int,
    world: int,
    timeout_s: float,
    directory: str,
    spec_json: bytes,
    data_digest: str,
    steps: int,
    layouts: list[MeshLayout],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory}/meet",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        spec = TrainSpec.model_validate_json(spec_json)
        for number, layout in enumerate(layouts):
            _write(Path(directory), number, rank, _trace(spec, data_digest, layout, steps))
            dist.barrier()
    finally:
        dist.destroy_process_group()


def _trace(spec: TrainSpec, data_digest: str, layout: MeshLayout, steps: int) -> "_Trace | str":
    """Trains from the initial weights, or returns why the layout is unsupported. Collective over the layout's ranks."""
    use_deterministic_kernels(True, warn_only=True)
    dataset = open_dataset(open_store(spec.storage), data_digest)
    num_rows = dataset.num_rows["train"]
    if layout.pp > 1 and spec.batch.accumulation_steps % (2 * layout.pp):
        # Micro-batches do not change the gradient; a pipeline needs several.
        batch = spec.batch.model_copy(update={"accumulation_steps": 2 * layout.pp})
        spec = spec.model_copy(update={"batch": batch})
    if spec.parallelism.pp_split is not None and len(spec.parallelism.pp_split) != layout.num_stages - 1:
        spec = spec.model_copy(update={"parallelism": spec.parallelism.model_copy(update={"pp_split": None})})
    coordinates = rank_coordinates(layout, "cpu")
    try:
        state = build_train_state(
            spec,
            dataset.features,
            num_rows,
            coordinates,
            torch.device("cpu"),
            torch.float64,
            count_class_rows(spec, dataset),
        )
    except ModelError as error:  # all ranks check the whole model, so that all of them raise it
        return str(error)
    plan, loader = build_plan(spec, num_rows), build_loader(spec, dataset, coordinates, state.min_rows)
    state.train()
    losses, norms = [], []
    for step in range(min(steps, plan.total_steps)):
        share, norm = train_step(plan, state, loader, step)
        losses.append(mean_loss(state, share, step))
        norms.append(norm or 0.0)
    tensors = tensors_of(state)
    return _Trace(losses, norms, {name: _whole(value) for name, value in tensors.items()})


def _whole(value: Tensor) -> Tensor:
    whole = value.full_tensor() if isinstance(value, DTensor) else value
    return whole.detach().double().contiguous().clone()


def _write(directory: Path, number: int, rank: int, outcome: "_Trace | str") -> None:
    path = directory / f"{number}-{rank}"
    if isinstance(outcome, str):
        path.with_suffix(".refused").write_text(outcome)
        return
    metrics = torch.tensor([outcome.losses, outcome.norms], dtype=torch.float64)
    safetensors.torch.save_file({"\0metrics": metrics, **outcome.parameters}, path.with_suffix(".safetensors"))


def _read(directory: Path, number: int) -> "_Trace | str":
    """Merges the parameters of all ranks: different pipeline stages have different parameters."""
    for path in sorted(directory.glob(f"{number}-*.refused")):
        return path.read_text()
    parameters: dict[str, Tensor] = {}
    for path in sorted(directory.glob(f"{number}-*.safetensors")):
        parameters |= safetensors.torch.load_file(path)
    losses, norms = parameters.pop("\0metrics").tolist()
    return _Trace(losses, norms, parameters)


def failures(compared: Sequence[Compared]) -> list[Compared]:
    """The layouts with differences or errors."""
    return [one for one in compared if one.refused is None and not one.is_equal]
