import pytest
import torch
from torch import nn

from maas_ray.errors import ModelError, SpecError
from maas_ray.models.build import build_model
from maas_ray.models.params import DecoderSpec
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row
from maas_ray.spec import parse_spec

VOCABULARY, LENGTH = 12, 16
SMALL = {"layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48}


def decoder(params: dict | None = None, length: int = LENGTH) -> nn.Module:
    torch.manual_seed(0)
    spec = ModelSpec(name="decoder", params=SMALL if params is None else params)
    return build_model(spec, Row((length,), VOCABULARY), VOCABULARY, per_token=True)


def token_ids(num_rows: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(1))


def test_it_learns_a_sequence_by_heart() -> None:
    model = decoder({**SMALL, "dropout": 0.1})
    assert model.training
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    rows = token_ids()
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(torch.tensor(VOCABULARY).log().item(), abs=0.1)
    assert losses[-1] < 0.5


def test_no_token_sees_a_later_one() -> None:
    model = decoder().double().eval()
    rows = token_ids()
    changed = rows.clone()
    changed[:, 9] = (rows[:, 9] + 1) % VOCABULARY
    differs = (model(rows) != model(changed)).any(dim=-1).any(dim=0)
    assert differs.tolist() == [False] * 9 + [True] * (LENGTH - 9)


def test_only_distances_between_tokens_count_not_their_places() -> None:
    attention = decoder(length=LENGTH)[2].attention.double()
    x = torch.randn(1, 6, 32, dtype=torch.float64)
    expected = attention(x)
    attention.cos, attention.sin = attention.cos.roll(-5, 0), attention.sin.roll(-5, 0)  # all tokens 5 positions later
    torch.testing.assert_close(attention(x), expected, atol=1e-6, rtol=1e-6)  # tables are float32


def test_float64_stays_float64_and_every_parameter_gets_a_gradient() -> None:
    model = decoder().double()
    logits = model(token_ids())
    assert (logits.dtype, logits.shape) == (torch.float64, (3, LENGTH, VOCABULARY))
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({}, (4, 256, 4, 4, 704)),
        ({"size": 12}, (12, 768, 12, 12, 2048)),
        ({"layers": 4, "heads": 4, "width": 128}, (4, 128, 4, 4, 384)),
        ({"size": 8, "kv_heads": 2, "mlp_width": 100}, (8, 512, 8, 2, 100)),
    ],
)
def test_the_dial_sets_what_is_not_given(params: dict, shape: tuple[int, ...]) -> None:
    spec = DecoderSpec(**params)
    assert (spec.num_layers, spec.num_values, spec.num_heads, spec.num_kv_heads, spec.num_mlp_values) == shape


def test_names_and_sizes_of_weights_are_stable() -> None:
    sizes = {name: tuple(value.shape) for name, value in decoder({**SMALL, "layers": 1}).state_dict().items()}
    assert sizes == {
        "embedding.weight": (12, 32),
        "block_0.attention_norm.weight": (32,),
        "block_0.attention.query.weight": (32, 32),
        "block_0.attention.key.weight": (16, 32),
        "block_0.attention.value.weight": (16, 32),
        "block_0.attention.output.weight": (32, 32),
        "block_0.mlp_norm.weight": (32,),
        "block_0.mlp.gate.weight": (48, 32),
        "block_0.mlp.up.weight": (48, 32),
        "block_0.mlp.down.weight": (32, 48),
        "norm.weight": (32,),
        "head.weight": (12, 32),
    }


def test_weights_are_drawn_as_gpt2_and_llama_draw_them() -> None:
    model = decoder({"layers": 8, "width": 128, "heads": 2})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
        else:
            wanted = 0.02 / 4 if name.endswith(("output.weight", "down.weight")) else 0.02
            assert parameter.std().item() == pytest.approx(wanted, rel=0.1), name


def test_a_slice_of_layers_keeps_names_and_plan() -> None:
    model = decoder().double().eval()
    first, last = model[:3], model[3:]
    assert torch.equal(last(first(token_ids())), model(token_ids()))
    assert [name for name, _ in last.named_children()] == ["block_1", "norm", "head"]
    assert last.tp_plan == model.tp_plan


@pytest.mark.parametrize(
    ("row", "num_outputs", "per_token", "params", "message"),
    [
        (Row((8,)), 4, True, {}, "decoder needs tokens, .* values of the shape"),
        (Row((8,), 12), 12, True, {"max_length": 4}, "max_length 4, but the rows have 8 tokens"),
        (Row((8,), 12), 3, True, {"tied": True}, "3 logits and 12 token ids"),
        (
            Row((8,), 12),
            3,
            False,
            {},
            "decoder does not return logits per row, .* use one of the models mlp, convnet, resnet",
        ),
    ],
)
def test_what_does_not_fit_the_data_is_refused(
    row: Row, num_outputs: int, per_token: bool, params: dict, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelSpec(name="decoder", params=SMALL | params), row, num_outputs, per_token=per_token)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"width": 30, "heads": 4}, "heads 4 does not divide width 30; use 3 heads"),
        ({"heads": 4, "kv_heads": 3}, "kv_heads 3 does not divide"),
        ({"width": 9, "heads": 3}, "3 values; the number must be even"),
        ({"rope": 1.0}, "unknown key 'rope'"),
    ],
)
def test_parameters_that_contradict_each_other_are_refused(params: dict, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_spec(DecoderSpec, params)
