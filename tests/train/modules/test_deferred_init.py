"""A module that is built without its data, and filled, is the module built at once, bit for bit; on ranks, its pieces are."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.loop.assemble import build_or_defer
from maas_ray.train.loop.gradients import local
from maas_ray.train.modules.deferred_init import Deferred
from maas_ray.train.modules.deferred_tape import CannotDefer, early_order, needed_steps
from maas_ray.train.parallel.distribute import distribute
from maas_ray.train.parallel.mesh import rank_coordinates
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.spec.parallelism import MeshLayout
from tests.support.ranks import run_ranks
from tests.support.small_runs import make_run

SEED = 5
CPU = torch.device("cpu")
TABLE, TOKENS, PADDED, IMAGES = Row((6,)), Row((6,), 12), Row((6,), 12, pad=0), Row((16, 16))
TEXT: dict[str, Any] = {"layers": 2, "width": 16, "heads": 2}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


class Own(nn.Module):
    """What users' modules do: copies, tied weights, buffers, changes long after the draw, values from Python and numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [rate.item() for rate in torch.linspace(0, 0.3, 3)]
        self.enter = nn.Linear(5, 8)
        self.start = nn.Parameter(torch.full((8,), 0.5))
        self.blocks = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.list = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])
        self.memory = nn.LSTM(8, 8)
        self.leave = nn.Linear(8, 5)
        self.leave.weight = nn.Parameter(self.enter.weight.detach().t().contiguous())
        self.again = nn.Linear(8, 8)
        self.again.weight = self.list[1].weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("seen", torch.ones(3, 3).tril(), persistent=False)
        nn.init.trunc_normal_(self.list[0].weight, std=0.02)
        with torch.no_grad():
            self.enter.bias[1:3] = 7.0
            self.list[3].weight.copy_(torch.from_numpy(np.eye(8, dtype=np.float32)))
            for weight in self.parameters():
                weight.mul_(0.5)

    def forward(self, rows: Tensor) -> Tensor:
        x = self.enter(rows) + self.start
        for layer in self.list:
            x = layer(x).tanh()
        logits: Tensor = self.leave(x) * self.scale
        return logits


def _builder(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        torch.manual_seed(SEED)
        return make().to(dtype)

    return build


def _model(name: str, params: Any, row: Row, per_token: bool, initialization: str = "default") -> nn.Module:
    spec = ModelSpec.model_validate({"name": name, "params": params, "initialization": initialization})
    return build_model(spec, row, 12 if per_token else 3, per_token=per_token)


def _tensors(*nets: nn.Module) -> dict[str, Tensor]:
    return {
        name: local(tensor.detach())
        for net in nets
        for name, tensor in (*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False))
    }


def _differing(net: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert net.keys() == other.keys()
    return [
        name
        for name, tensor in net.items()
        if tensor.dtype != other[name].dtype or tensor.stride() != other[name].stride() or not torch.equal(tensor, other[name])
    ]  # fmt: skip


def _ties(net: nn.Module) -> list[int]:
    seen: list[int] = []
    for _, weight in net.named_parameters(remove_duplicate=False):
        seen.append(id(weight))
    return [seen.index(each) for each in seen]


FAST = [
    ("mlp", {"size": 2, "norm": "batch"}, TABLE, False, "he_normal"),
    ("mlp", {"size": 2}, TABLE, False, "orthogonal"),
    ("convnet", {}, IMAGES, False, "default"),
    ("encoder", TEXT, PADDED, False, "normal"),
    ("decoder", TEXT | {"tied": True}, TOKENS, True, "default"),
    ("hf:BertForMaskedLM", {"config": BERT}, PADDED, True, "default"),
]
SLOW = [
    ("resnet", {}, IMAGES, False, "default"),
    ("encoder", TEXT, PADDED, True, "default"),
    ("hf:LlamaForCausalLM", {"config": BERT | {"num_key_value_heads": 1}}, TOKENS, True, "default"),
    ("hf:GPT2LMHeadModel", {"config": {"n_embd": 16, "n_layer": 2, "n_head": 2}}, TOKENS, True, "default"),
    ("hf:ViTForImageClassification", {"config": BERT | {"patch_size": 8}}, IMAGES, False, "xavier_uniform"),
]


@pytest.mark.parametrize(
    ("name", "params", "row", "per_token", "initialization"),
    [*FAST, *(pytest.param(*case, marks=pytest.mark.fault) for case in SLOW)],
)
def test_every_model_is_filled_with_what_building_it_at_once_gives(
    name: str, params: Any, row: Row, per_token: bool, initialization: str
) -> None:
    dtype = torch.float64 if name == "encoder" else torch.float32
    _assert_same(_builder(lambda: _model(name, params, row, per_token, initialization), dtype))


def test_a_users_module_gets_the_same_values_as_if_built_at_once() -> None:
    net = _assert_same(_builder(Own))
    assert isinstance(net, Own)
    assert net.rates == Own().rates
    _assert_same(_builder(Own, torch.float64))


def _assert_same(build: Callable[[], nn.Module]) -> nn.Module:
    whole = build()
    after = torch.rand(3)  # of what is drawn next
    deferred = Deferred(build, SEED)
    assert all(tensor.is_meta for tensor in _tensors(deferred.net).values())
    deferred.fill([deferred.net], CPU)
    assert torch.equal(torch.rand(3), after)
    assert _differing(_tensors(whole), _tensors(deferred.net)) == []
    assert _ties(whole) == _ties(deferred.net)
    return deferred.net


def _drop_a_draw(deferred: Deferred) -> None:
    del deferred.steps[next(n for n, step in enumerate(deferred.steps) if step.is_draw)]


def _swap_two_draws(deferred: Deferred) -> None:
    steps = deferred.steps
    first, *_, last = [n for n, step in enumerate(steps) if step.is_draw]
    steps[first], steps[last] = steps[last], steps[first]


def _forget_a_change(deferred: Deferred) -> None:
    changes = [n for n, step in enumerate(deferred.steps) if str(step.function).startswith("aten.mul_")]
    del deferred.steps[changes[-1]]


@pytest.mark.parametrize("fault", [_drop_a_draw, _swap_two_draws, _forget_a_change])
def test_a_step_that_is_lost_or_done_at_another_time_is_noticed(fault: Callable[[Deferred], None]) -> None:
    build = _builder(Own)
    deferred = Deferred(build, SEED)
    fault(deferred)
    deferred.fill([deferred.net], CPU)
    assert _differing(_tensors(build()), _tensors(deferred.net))


def test_a_tensor_is_finished_before_the_next_one_is_drawn_whenever_it_was_changed() -> None:
    deferred = Deferred(_builder(Own), SEED)
    is_needed = needed_steps(deferred.steps, {ref.key for ref in deferred.tensors.values()})
    as_written = [n for n, needed in enumerate(is_needed) if needed]
    assert _most_at_once(deferred, as_written) > 20  # all weights are scaled at the end
    assert (
        _most_at_once(deferred, [n for n in early_order(deferred.steps, is_needed) if is_needed[n]]) < 10
    )  # what is only computed with included


def _most_at_once(deferred: Deferred, order: list[int]) -> int:
    uses = [deferred.steps[n].reads | deferred.steps[n].writes for n in order]
    last = {key: place for place, keys in enumerate(uses) for key in keys}
    first = {key: place for place, keys in reversed([*enumerate(uses)]) for key in keys}
    return max(sum(first[key] <= place <= last[key] for key in last) for place in range(len(uses)))


class _Draws(nn.Module):
    def __init__(self, then: Callable[[nn.Linear], Any]) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept = then(self.layer)
        self.after = nn.Linear(3, 3)


def _fork(layer: nn.Linear) -> None:
    with torch.random.fork_rng():
        nn.init.normal_(layer.weight)


FROM_ELSEWHERE = torch.ones(3)


def _fill_later(weight: Tensor) -> None:
    values = np.zeros((3, 3), np.float32)
    shared = torch.from_numpy(values)
    values[:] = 7.0
    weight.data.copy_(shared)


def _catches(layer: nn.Linear) -> None:
    try:
        nn.init.normal_(layer.weight, generator=torch.Generator())
    except Exception:
        return


@pytest.mark.parametrize(
    ("then", "reason"),
    [
        (lambda layer: layer.weight.sum().item(), "DataDependentOutputException"),
        (lambda layer: layer.weight.detach().numpy().sum(), "RuntimeError"),
        (lambda layer: torch.manual_seed(SEED), "it sets torch's random generator"),
        (_fork, "it sets torch's random generator"),
        (_catches, "it uses its own random generator"),
        (lambda layer: torch.ones(4, 2), r"neither parameters nor buffers, with the shapes \[4, 2\]"),
        (lambda layer: nn.Parameter(FROM_ELSEWHERE), "kept is not created by the module itself"),
        (lambda layer: FROM_ELSEWHERE.add_(1), "in place"),
        (lambda layer: _fill_later(layer.weight), "changes during the build"),
        (lambda layer: nn.Parameter(layer.weight.detach()[0]), "shares its memory with another"),
        (
            lambda layer: torch.zeros(600, 600).copy_(torch.from_numpy(np.ones((600, 600)))),
            "more than 1 MiB of external data",
        ),
    ],
)
def test_what_cannot_be_written_down_is_refused_with_the_reason(then: Callable[[nn.Linear], Any], reason: str) -> None:
    with pytest.raises(CannotDefer, match=reason):
        Deferred(_builder(lambda: _Draws(then)), SEED)


def test_such_a_model_is_built_at_once_and_the_log_contains_the_reason(
    file_store: ObstoreStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    layouts = [MeshLayout(dp_shard=2)]
    spec, dataset = make_run(file_store, tmp_path, "tests.support.nets:Flat")  # its layer is lazy
    with caplog.at_level(logging.INFO):
        net, deferred = build_or_defer(spec, dataset.features, layouts)
    assert deferred is None
    assert not any(tensor.is_meta for tensor in _tensors(net).values())
    assert "each rank holds the whole model during its build" in caplog.text
    spec, dataset = make_run(file_store, tmp_path, "mlp")
    whole, deferred = build_or_defer(spec, dataset.features, [MeshLayout(), MeshLayout(dp_replicate=2)])
    assert deferred is None
    net, deferred = build_or_defer(spec, dataset.features, layouts)
    assert deferred is not None
    deferred.fill([net], CPU)
    assert _differing(_tensors(whole), _tensors(net)) == []


def test_a_sharded_run_is_checked_without_data(file_store: ObstoreStore, tmp_path: Path) -> None:
    shared = {"workers": {"count": 2}, "parallelism": {"dp_shard": 2}}
    spec, dataset = make_run(file_store, tmp_path, "mlp", **shared)
    check_run(spec, dataset, file_store)
    spec, dataset = make_run(
        file_store, tmp_path, "mlp", **shared | {"parallelism": {"tp": 2, "tp_plan": {"head": "no"}}}
    )
    with pytest.raises(ModelError, match="the style 'no'"):
        check_run(spec, dataset, file_store)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": Own,
    "decoder": lambda: _model("decoder", TEXT | {"layers": 3}, TOKENS, True),
}
EXAMPLES = {"own": torch.zeros(2, 5), "decoder": torch.zeros(2, 6, dtype=torch.int64)}
PLANS = {"own": {"list.0": "colwise", "list.1": "rowwise", "again": "rowwise"}, "decoder": None}


def _compare_pieces(rank: int, cases: list[tuple[str, MeshLayout]]) -> list[list[str]]:
    found = []
    for name, layout in cases:
        coordinates, build = rank_coordinates(layout, "cpu"), _builder(MODELS[name])
        asked: Any = {"plan": PLANS[name], "example": EXAMPLES[name]}
        whole = distribute(build(), coordinates, CPU, **asked).bare
        deferred = Deferred(build, SEED)
        parts = distribute(deferred.net, coordinates, CPU, **asked).bare
        assert all(tensor.is_meta for tensor in _tensors(*parts).values())
        deferred.fill(parts, CPU)
        found.append(_differing(_tensors(*whole), _tensors(*parts)))
        assert all(_ties(one) == _ties(other) for one, other in zip(whole, parts, strict=True))
    return found


def test_pieces_on_two_ranks_are_those_of_the_whole() -> None:
    cases = [
        ("own", MeshLayout(dp_shard=2)),
        ("decoder", MeshLayout(tp=2, sequence_parallel=True)),
        ("decoder", MeshLayout(pp=2, schedule="interleaved")),
    ]
    assert run_ranks(_compare_pieces, 2, cases) == [[[]] * len(cases)] * 2


@pytest.mark.fault
def test_pieces_on_four_ranks_are_those_of_the_whole() -> None:
    cases = [
        ("own", MeshLayout(dp_shard=2, tp=2)),
        ("decoder", MeshLayout(dp_shard=2, tp=2)),
        ("decoder", MeshLayout(dp_shard=2, pp=2)),
        ("decoder", MeshLayout(tp=2, pp=2)),
        ("decoder", MeshLayout(dp_replicate=2, dp_shard=2)),
    ]
    assert run_ranks(_compare_pieces, 4, cases) == [[[]] * len(cases)] * 4


def _memory(key: str) -> float:
    """MiB that this process has now (VmRSS) or had at most (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / 1024


def _peak(rank: int, is_deferred: bool) -> float:
    coordinates = rank_coordinates(MeshLayout(dp_shard=2), "cpu")
    build = _builder(lambda: nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(25))))
    small = Deferred(_builder(lambda: nn.Linear(2, 2)), SEED)  # imports what it imports
    small.fill([small.net], CPU)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
    before = _memory("VmRSS")
    if is_deferred:
        deferred = Deferred(build, SEED)
        deferred.fill(distribute(deferred.net, coordinates, CPU).bare, CPU)
    else:
        distribute(build(), coordinates, CPU)
    return _memory("VmHWM") - before


@pytest.mark.fault
def test_a_rank_never_holds_the_whole_model() -> None:
    at_once = max(run_ranks(_peak, 2, False))
    deferred = max(run_ranks(_peak, 2, True))
    print(f"400 MiB of weights on 2 ranks: {at_once:.0f} MiB built at once, {deferred:.0f} MiB deferred")  # noqa: T201
    assert at_once > 400
    assert deferred < 0.65 * at_once
    assert deferred < 400
