"""What makes training faster or smaller changes nothing that is trained, and really happens."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from maas_ray.data.stored.dataset import Dataset, open_dataset
from maas_ray.errors import ModelError, ResourcesMissing, SpecError
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore, open_store
from maas_ray.train.loop.assemble import build_loader, build_plan, build_train_state
from maas_ray.train.loop.step import mean_loss, train_step
from maas_ray.train.loop.train_state import TrainState
from maas_ray.train.modules import activation_checkpoint
from maas_ray.train.modules.activation_checkpoint import recompute_blocks
from maas_ray.train.modules.compile import compile_blocks, refuse_no_compiler
from maas_ray.train.modules.dropout import replace_dropout, resumed, samples
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.performance import PerformanceSpec
from maas_ray.train.spec.train import TrainSpec
from tests.support.ranks import run_ranks
from tests.support.small_runs import make_run

CPU = torch.device("cpu")
KINDS = ["full", "selective"]


class _Products(TorchDispatchMode):
    """Counts matrix products, and the types they are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.number += 1
            self.dtypes.add(result.dtype)
        return result


def _train_state(spec: TrainSpec, dataset: Dataset, layout: MeshLayout, dtype: torch.dtype) -> TrainState:
    return build_train_state(
        spec, dataset.features, dataset.num_rows["train"], rank_coordinates(layout, "cpu"), CPU, dtype
    )


def _steps(
    spec: TrainSpec, dataset: Dataset, layout: MeshLayout, *, steps: int = 2, dtype: torch.dtype = torch.float64
) -> tuple[dict[str, Tensor], list[float], _Products]:
    """Parameters after some steps, their losses, and the matrix products of the last one."""
    state = _train_state(spec, dataset, layout, dtype)
    plan, loader = build_plan(spec, dataset.num_rows["train"]), build_loader(spec, dataset, state.coordinates)
    state.train()
    losses = []
    for step in range(steps):
        with _Products() as products:
            share, _ = train_step(plan, state, loader, step)
        losses.append(mean_loss(state, share, step))
    named = {name: value.detach() for part in state.parts for name, value in part.named_parameters()}
    pieces = {name: value.to_local() if isinstance(value, DTensor) else value for name, value in named.items()}
    return pieces, losses, products


def _with(spec: TrainSpec, **changes: Any) -> TrainSpec:
    return TrainSpec.model_validate({**spec.model_dump(mode="json"), **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["mlp", "decoder", "encoder"])
def test_what_is_computed_again_is_the_same_to_the_bit_dropout_included(
    file_store: ObstoreStore, tmp_path: Path, model: str, kind: str
) -> None:
    spec, dataset = make_run(file_store, tmp_path, model, batch={"global_size": 12, "accumulation_steps": 2})
    kept, losses, products = _steps(spec, dataset, MeshLayout())
    again, same, more = _steps(_with(spec, performance={"activation_checkpointing": kind}), dataset, MeshLayout())
    assert losses == same
    assert kept.keys() == again.keys()
    assert all(torch.equal(value, again[name]) for name, value in kept.items())
    # A forward pass is a third of the products: `full` computes those of the blocks twice, `selective` none.
    if kind == "full":
        assert 1.1 * products.number < more.number <= 4 / 3 * products.number
    else:
        assert products.number == more.number


def test_dropout_that_forgets_whose_rows_are_computed_again_is_caught(
    file_store: ObstoreStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "mlp", performance={"activation_checkpointing": "full"})
    monkeypatch.setattr(activation_checkpoint, "resumed", lambda rows: resumed(None))
    with pytest.raises(ModelError, match="for no samples"):
        _steps(spec, dataset, MeshLayout())


def test_a_model_without_blocks_cannot_forget_any() -> None:
    with pytest.raises(ModelError, match="Linear has no blocks"):
        recompute_blocks(nn.Linear(2, 2), "full")


LAYOUTS = [(MeshLayout(dp_shard=2), 0.0), (MeshLayout(pp=2), 25.0)]
WIDE = [
    *LAYOUTS,
    (MeshLayout(dp_replicate=2), 25.0),
    (MeshLayout(dp_shard=2), 0.1),  # two blocks at once
    (MeshLayout(dp_shard=2), 25.0),
    (MeshLayout(tp=2, sequence_parallel=True), 25.0),
    (MeshLayout(pp=2, schedule="interleaved"), 25.0),
    (MeshLayout(dp_replicate=2, dp_shard=2), 0.0),
    (MeshLayout(dp_shard=2, tp=2), 0.0),
    (MeshLayout(pp=2, dp_shard=2), 0.0),
    (MeshLayout(pp=2, tp=2), 25.0),
]


def _recomputed_on(
    rank: int, spec_json: str, digest: str, sizes: list[tuple[MeshLayout, float]], kinds: list[str]
) -> list[tuple[str, bool]]:
    """For each layout and kind: whether two steps are the same to the bit as without."""
    spec = TrainSpec.model_validate_json(spec_json)
    dataset = open_dataset(open_store(spec.storage), digest)
    found = []
    for layout, unit in sizes:
        plain = _with(spec, parallelism={"shard_unit_mib": unit})
        kept, losses, _ = _steps(plain, dataset, layout)
        for kind in kinds:
            again, same, _ = _steps(_with(plain, performance={"activation_checkpointing": kind}), dataset, layout)
            is_same = losses == same and kept.keys() == again.keys()
            found.append(
                (f"{layout} {unit} {kind}", is_same and all(torch.equal(kept[key], again[key]) for key in kept))
            )
    return found


def _bf16_in_stages(rank: int, spec_json: str, digest: str) -> tuple[bool, list[float], list[float]]:
    spec = TrainSpec.model_validate_json(spec_json)
    dataset = open_dataset(open_store(spec.storage), digest)
    _, exact, products = _steps(spec, dataset, MeshLayout(pp=2), dtype=torch.float32)
    _, losses, rounded = _steps(_with(spec, precision="bf16"), dataset, MeshLayout(pp=2), dtype=torch.float32)
    is_bf16 = products.dtypes == {torch.float32} and rounded.dtypes == {torch.bfloat16}
    return is_bf16, exact, losses


def _both(
    rank: int, spec_json: str, digest: str
) -> tuple[list[tuple[str, bool]], tuple[bool, list[float], list[float]]]:
    return _recomputed_on(rank, spec_json, digest, LAYOUTS, ["full"]), _bf16_in_stages(rank, spec_json, digest)


@pytest.mark.fault  # several processes; recomputation is shown in one process too
def test_shards_and_stages_compute_the_same_again_and_stages_compute_in_bfloat16(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder", batch={"global_size": 12, "accumulation_steps": 4})
    for recomputed, (is_bf16, exact, losses) in run_ranks(_both, 2, spec.model_dump_json(), dataset.digest):
        assert [name for name, is_same in recomputed if not is_same] == []
        assert len(recomputed) == len(LAYOUTS)
        assert is_bf16
        assert losses != exact
        assert losses == pytest.approx(exact, rel=2e-2)


@pytest.mark.fault
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_computes_the_same_again(file_store: ObstoreStore, tmp_path: Path, world: int) -> None:
    spec, dataset = make_run(file_store, tmp_path, "decoder", batch={"global_size": 12, "accumulation_steps": 4})
    sizes = [size for size in WIDE if size[0].world == world]
    for found in run_ranks(_recomputed_on, world, spec.model_dump_json(), dataset.digest, sizes, KINDS):
        assert [name for name, is_same in found if not is_same] == []
        assert len(found) == len(sizes) * len(KINDS)


@pytest.mark.parametrize(("variable", "value"), [("CXX", "no-such-compiler"), ("PATH", "/nowhere")])
def test_compiling_without_a_compiler_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ResourcesMissing, match=r"no C\+\+ compiler .* or remove compile"):
        refuse_no_compiler()


def test_a_compiled_block_chooses_what_it_recomputes() -> None:
    with pytest.raises(SpecError, match="use none or full"):
        parse_spec(PerformanceSpec, {"compile": True, "activation_checkpointing": "selective"}, source="s")


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")  # the compiler's own code
@pytest.mark.parametrize("kind", ["none", "full"])
@pytest.mark.parametrize("model", ["mlp", "decoder"])
def test_compiled_blocks_train_the_same_dropout_included(
    file_store: ObstoreStore, tmp_path: Path, model: str, kind: str
) -> None:
    spec, dataset = make_run(file_store, tmp_path, model)
    expected, _, _ = _steps(spec, dataset, MeshLayout())
    asked = _with(spec, performance={"compile": True, "activation_checkpointing": kind})
    state = _train_state(asked, dataset, MeshLayout(), torch.float64)
    plan, loader = build_plan(spec, dataset.num_rows["train"]), build_loader(spec, dataset, state.coordinates)
    from torch._dynamo.utils import counters  # takes seconds

    torch._dynamo.reset()  # what another test has compiled would serve here too
    before = counters["stats"]["unique_graphs"]
    for step in range(2):
        train_step(plan, state, loader, step)
    assert counters["stats"]["unique_graphs"] > before
    for name, value in state.parts[0].named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], rtol=0.0, atol=1e-10)


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.dropout = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dropout(torch.relu(self.inner(x))) + x)


def _in_sequence(*last: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), *last, nn.Linear(8, 8))


@pytest.mark.fault
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("default::DeprecationWarning", "default::UserWarning")
@pytest.mark.parametrize(
    ("make", "num_graphs"),
    [
        (lambda: _in_sequence(nn.Dropout(0.2)), 2),
        (lambda: _in_sequence(_in_sequence(nn.Dropout(0.2))), 3),
        (lambda: _in_sequence(_Residual()), 4),
    ],
    ids=["sequence", "sequence in a sequence", "block in a sequence"],
)
def test_modules_between_layers_of_dropout_are_compiled(make: Callable[[], nn.Module], num_graphs: int) -> None:
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    plain = nn.Sequential(make()).double()
    replace_dropout(plain)
    compiled = deepcopy(plain)
    compile_blocks(compiled)
    before = counters["stats"]["unique_graphs"]
    rows = torch.randn(12, 8, dtype=torch.float64)
    for net in (plain, compiled):
        with samples(0, torch.arange(12)):
            net(rows).square().sum().backward()
    assert counters["stats"]["unique_graphs"] - before >= num_graphs
    for expected, trained in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(trained.grad, expected.grad, rtol=0.0, atol=1e-10)


def _compiled_on(rank: int, spec_json: str, digest: str, layouts: list[MeshLayout]) -> list[tuple[str, float, bool]]:
    spec = TrainSpec.model_validate_json(spec_json)
    dataset = open_dataset(open_store(spec.storage), digest)
    found = []
    for layout in layouts:
        expected, _, _ = _steps(spec, dataset, layout)
        asked = _with(spec, performance={"compile": True, "activation_checkpointing": "full"})
        trained, _, _ = _steps(asked, dataset, layout)
        worst = max(float((expected[name] - value).abs().max()) for name, value in trained.items())
        found.append((str(layout), worst, expected.keys() == trained.keys()))
    return found


@pytest.mark.fault
@pytest.mark.timeout(900)
def test_compiled_blocks_train_the_same_in_replicas_shards_and_stages(file_store: ObstoreStore, tmp_path: Path) -> None:
    asked = {"batch": {"global_size": 12, "accumulation_steps": 4}, "parallelism": {"shard_unit_mib": 0}}
    spec, dataset = make_run(file_store, tmp_path, "decoder", **asked)
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(tp=2), MeshLayout(pp=2)]
    for found in run_ranks(_compiled_on, 2, spec.model_dump_json(), dataset.digest, layouts):
        assert [name for name, worst, is_same in found if worst > 1e-10 or not is_same] == []
        assert len(found) == len(layouts)
