from fnmatch import fnmatchcase

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from tests.support.ranks import run_ranks

TOKENS, VALUES = Row((6,), 8), Row((5,))
CASES: dict[str, tuple[ModelSpec, Row, bool]] = {
    "decoder": (
        ModelSpec(name="decoder", params={"layers": 2, "width": 16, "heads": 4, "kv_heads": 2, "mlp_width": 24}),
        TOKENS,
        True,
    ),
    "masked encoder": (
        ModelSpec(name="encoder", params={"layers": 2, "width": 12, "heads": 2}),
        Row((6,), 8, pad=0),
        True,
    ),
    "encoder": (ModelSpec(name="encoder", params={"layers": 1, "width": 12, "heads": 2}), TOKENS, False),
    "mlp": (ModelSpec(name="mlp", params={"size": 2}), VALUES, False),
    "deep mlp": (ModelSpec(name="mlp", params={"size": 3, "activation": "gelu"}), VALUES, False),
    "normalized mlp": (ModelSpec(name="mlp", params={"size": 2, "norm": "layer"}), VALUES, False),
}
STYLES = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
}


def build(case: str) -> nn.Module:
    torch.manual_seed(0)
    spec, row, per_token = CASES[case]
    return build_model(spec, row, 8 if per_token else 3, per_token=per_token).double()


def step(case: str, model: nn.Module) -> torch.Tensor:
    """Logits and all gradients, in one vector."""
    generator = torch.Generator().manual_seed(1)
    row = CASES[case][1]
    rows = (
        torch.randint(0, 8, (4, *row.shape), generator=generator)
        if row.is_tokens
        else torch.randn(4, *row.shape, generator=generator, dtype=torch.float64)
    )
    logits = model(rows)
    logits.square().sum().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    whole = [gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient for gradient in gradients]
    return torch.cat([logits.detach().flatten(), *(gradient.flatten() for gradient in whole)])


def _parallel(rank: int, plans: dict[str, dict[str, str]]) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", (2,))
    steps = {}
    for case, plan in plans.items():
        model = build(case)
        parallelize_module(model, mesh, {name: STYLES[style]() for name, style in plan.items() if style in STYLES})
        steps[case] = step(case, model)
    return steps


@pytest.mark.fault
def test_two_ranks_that_follow_the_plan_compute_what_one_does() -> None:
    plans = {case: build(case).tp_plan for case in CASES}
    found = run_ranks(_parallel, 2, plans)
    for case in CASES:
        for steps in found:
            torch.testing.assert_close(steps[case], step(case, build(case)), atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_every_entry_of_a_plan_names_layers_that_it_can_cut(case: str) -> None:
    model = build(case)
    layers = dict(model.named_modules())
    for pattern, style in model.tp_plan.items():
        matched = [
            layers[name] for name in layers if name.count(".") == pattern.count(".") and fnmatchcase(name, pattern)
        ]
        assert matched, pattern
        kind = {"embedding_rowwise": nn.Embedding, "sequence_parallel": nn.RMSNorm}.get(style, nn.Linear)
        assert all(isinstance(layer, kind) for layer in matched), pattern


@pytest.mark.parametrize(("name", "embedding"), [("decoder", "embedding"), ("encoder", "embedding.tokens")])
def test_layers_over_codes_that_ranks_cannot_share_equally_stay_whole(name: str, embedding: str) -> None:
    spec = ModelSpec(name=name, params={"size": 4, "width": 16})
    for num_ids, is_cut in ((64, True), (65, False)):
        plan = build_model(spec, Row((6,), num_ids), num_ids, per_token=True).tp_plan
        assert (embedding in plan, "head" in plan) == (is_cut, is_cut)
        assert "*.attention.query" in plan


def test_tied_weights_are_one_parameter_and_left_whole() -> None:
    spec = ModelSpec(name="decoder", params={"size": 1, "tied": True})
    model = build_model(spec, TOKENS, 8, per_token=True)
    assert model.head.weight is model.embedding.weight
    assert not {"embedding", "head"} & model.tp_plan.keys()
