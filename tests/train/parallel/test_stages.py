"""Pipeline stages of modules that are not a sequence of layers: bit-equal to the whole, by the same names, or refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from maas_ray.errors import ModelError
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.train.parallel.pipeline import split_layers
from maas_ray.train.parallel.stages import find_units

TOKENS, PADDED, IMAGES = Row((6,), 12), Row((6,), 12, pad=0), Row((16, 16))
LLAMA = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
BERT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
GPT2 = {"n_embd": 16, "num_hidden_layers": 3, "n_head": 2}


class Blocks(nn.Module):
    """As a user writes it: a list, a weight of its own, and what follows from the rows used in each layer."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.enter = nn.Linear(6, 8)
        self.start = nn.Parameter(torch.ones(8))
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(count)])
        self.leave = nn.Linear(8, 3)

    def forward(self, rows: Tensor) -> Tensor:
        gate = rows.mean(dim=1, keepdim=True).sigmoid()
        x = self.enter(rows) + self.start
        for block in self.blocks:
            x = block(x.tanh() * gate)
        return self.leave(x)


class Skips(Blocks):
    def forward(self, rows: Tensor) -> Tensor:
        first = self.enter(rows)
        x = first
        for block in self.blocks:
            x = block(x)
        return self.leave(x + first)


class Residual(Blocks):
    def forward(self, rows: Tensor) -> Tensor:
        x = self.enter(rows)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


class Twice(Blocks):
    def forward(self, rows: Tensor) -> Tensor:
        x = self.enter(rows)
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return self.leave(x)


class Chooses(Blocks):
    def forward(self, rows: Tensor) -> Tensor:
        x = self.enter(rows)
        for block in self.blocks:
            x = block(x) if x.mean().item() > 0 else block(x) + 1
        return self.leave(x)


class UsesWeightsAgain(Blocks):
    def forward(self, rows: Tensor) -> Tensor:
        x = self.enter(rows)
        for block in self.blocks:
            x = block(x)
        return self.leave(x + self.start) @ self.blocks[0].weight[:3, :3]


def _chain(stages: list[nn.Module], rows: Tensor) -> Tensor:
    result = stages[0](rows)
    for stage in stages[1:]:
        result = stage(*(result if isinstance(result, tuple) else (result,)), rows=rows)
    return result


def _hugging_face(name: str, config: dict[str, Any], row: Row) -> nn.Module:
    torch.manual_seed(0)
    per_token = "Classification" not in name
    spec = ModelSpec(name=f"hf:{name}", params={"config": config})
    return build_model(spec, row, 12 if per_token else 3, per_token=per_token)


def _rows(row: Row, count: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    if not row.is_tokens:
        return torch.randn(count, *row.shape, generator=generator)
    token_ids = torch.randint(1, 12, (count, *row.shape), generator=generator)
    token_ids[:, 4:] = 0
    return token_ids


def _assert_same(net: nn.Module, stages: list[nn.Module], rows: Tensor) -> None:
    for part in (net, *stages):
        part.eval()
    assert torch.equal(_chain(stages, rows), net(rows))
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(net.state_dict())
    _chain(stages, rows).square().sum().backward()
    gradients = {name: weight.grad for stage in stages for name, weight in stage.named_parameters()}
    for weight in net.parameters():
        weight.grad = None
    net(rows).square().sum().backward()
    for name, weight in net.named_parameters():
        assert weight.grad is None or torch.equal(gradients[name], weight.grad), name


@pytest.mark.parametrize(
    ("name", "config", "row"),
    [
        ("LlamaForCausalLM", LLAMA, TOKENS),
        ("GPT2LMHeadModel", GPT2 | {"tie_word_embeddings": False}, TOKENS),
        ("BertForSequenceClassification", BERT, PADDED),
        ("ViTForImageClassification", BERT | {"patch_size": 8}, IMAGES),
    ],
)
def test_stages_of_a_transformers_model_give_the_same_by_the_same_names(
    name: str, config: dict[str, Any], row: Row
) -> None:
    net, rows = _hugging_face(name, config, row), _rows(row)
    _assert_same(net, split_layers(net, 3, example=rows[:1]), rows)


def test_stages_of_a_users_module_begin_at_the_given_names() -> None:
    net, rows = Blocks(), torch.randn(5, 6)
    stages = split_layers(net, 3, example=rows, named=["blocks.1", "leave"])
    assert [sorted(stage.state_dict()) for stage in stages] == [
        ["blocks.0.bias", "blocks.0.weight", "enter.bias", "enter.weight", "start"],
        [f"blocks.{i}.{what}" for i in (1, 2, 3) for what in ("bias", "weight")],
        ["leave.bias", "leave.weight"],
    ]
    copies = {name: value.clone() for name, value in net.state_dict().items()}
    _assert_same(net, stages, rows)
    assert all(torch.equal(value, copies[name]) for name, value in net.state_dict().items())


def test_layers_inside_others_can_begin_a_stage() -> None:
    net = _hugging_face("LlamaForCausalLM", LLAMA, TOKENS)
    assert find_units(net)[:3] == ["model.model.embed_tokens", "model.model.layers.0", "model.model.layers.1"]
    assert "model.model.layers.1.mlp" in find_units(net, ["model.model.layers.1.mlp"])
    sequence = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    rows = torch.randn(3, 4)
    _assert_same(sequence, split_layers(sequence, 2, example=rows, named=["0.1"]), rows)


@pytest.mark.parametrize(
    ("net", "named", "message"),
    [
        (Skips(), None, "does not receive all earlier results that it and later layers need"),
        (Residual(), ["blocks.1"], "blocks.1 does not receive all earlier results"),
        (Twice(), None, "blocks.0 is called 2 times"),
        (Chooses(), None, "cannot be split into pipeline stages: DataDependentOutputException"),
        (UsesWeightsAgain(), ["blocks.2"], "does not receive all"),
        (Blocks(), ["block.1"], "can start at 'block.1'; did you mean 'blocks.1'"),
        (Blocks(), ["enter"], "give 1 different layers in the order blocks.0, blocks.1"),
        (Blocks(), ["blocks.1", "blocks.0"], "cannot be the first layers of stages 2 to 2"),
    ],
)
def test_a_module_that_cannot_be_cut_is_refused_with_the_reason(
    net: nn.Module, named: list[str] | None, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        split_layers(net, 2, example=torch.randn(2, 6), named=named)


def test_tied_weights_on_two_stages_are_refused() -> None:
    net = _hugging_face("GPT2LMHeadModel", GPT2, TOKENS)
    with pytest.raises(ModelError, match="wte.weight and model.lm_head.weight are the same weight"):
        split_layers(net, 2, example=_rows(TOKENS))


def test_a_buffer_of_one_number_stays_with_its_layer() -> None:
    net, rows = Blocks(), torch.randn(5, 6)
    net.blocks[2].register_buffer("scale", torch.tensor(2.0))
    net.enter.register_buffer("same", torch.ones(1).expand(3))
    stages = split_layers(net, 2, example=rows)
    assert sorted(name for stage in stages for name, _ in stage.named_buffers()) == ["blocks.2.scale", "enter.same"]
    _assert_same(net, stages, rows)


def test_stages_in_a_wrong_order_are_noticed() -> None:
    net, rows = Blocks(), torch.randn(5, 6)
    first, second, third, fourth = split_layers(net, 4, example=rows)
    assert torch.equal(_chain([first, second, third, fourth], rows), net(rows))
    assert not torch.equal(_chain([first, third, second, fourth], rows), net(rows))


def test_a_missing_value_is_not_a_number() -> None:
    stage = split_layers(Blocks(), 2, example=torch.randn(2, 6))[1]
    rows = torch.randn(5, 6)
    handed = torch.randn(5, 8)
    assert torch.isfinite(stage(handed, rows=rows)).all()
    assert torch.isnan(stage.get_submodule("enter")(rows)).all()
    assert torch.isnan(stage.__dict__["start"]).all()
