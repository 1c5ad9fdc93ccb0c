import logging

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from maas_ray.data.spec.features import Features, TokensColumn
from maas_ray.errors import ModelError
from maas_ray.export.onnx_export import export
from maas_ray.models.build import build_model
from maas_ray.models.params import EncoderSpec
from maas_ray.models.spec import ModelSpec
from maas_ray.row import Row

VOCABULARY, LENGTH, PAD = 12, 16, 0
SMALL = {"layers": 2, "width": 32, "heads": 4}
KINDS = [(True, {}), (False, {"pool": "mean"}), (False, {"pool": "first"})]


def encoder(
    per_token: bool, params: dict | None = None, num_outputs: int | None = None, pad: int | None = None
) -> nn.Module:
    torch.manual_seed(0)
    spec = ModelSpec(name="encoder", params=SMALL | (params or {}))
    return build_model(spec, Row((LENGTH,), VOCABULARY, pad), num_outputs or VOCABULARY, per_token=per_token)


def token_ids(num_rows: int = 3, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (num_rows, length), generator=torch.Generator().manual_seed(1))


def test_it_learns_which_token_a_row_contains() -> None:
    rows = torch.randint(2, VOCABULARY, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    target = torch.arange(64) % 2
    rows[torch.arange(64), torch.arange(64) % LENGTH] = target
    model = encoder(per_token=False, params={"dropout": 0.1}, num_outputs=2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(rows), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model.eval()(rows).argmax(dim=1) == target).float().mean() > 0.95


@pytest.mark.parametrize(("per_token", "params"), KINDS)
def test_float64_stays_float64_and_every_parameter_gets_a_gradient(per_token: bool, params: dict) -> None:
    model = encoder(per_token, params).double()
    logits = model(token_ids())
    assert logits.dtype == torch.float64
    assert logits.shape == ((3, LENGTH, VOCABULARY) if per_token else (3, VOCABULARY))
    logits.square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("per_token", "params"), KINDS)
@pytest.mark.parametrize("cut", [1, 3])
def test_padding_changes_nothing_even_when_the_layers_run_in_two_stages(
    per_token: bool, params: dict, cut: int
) -> None:
    model = encoder(per_token, params, pad=PAD).double().eval()
    rows = token_ids()
    padded = torch.cat((rows[:, :10], torch.full((3, LENGTH - 10), PAD)), dim=1)
    found, wanted = model[cut:](model[:cut](padded)), model(rows[:, :10])
    torch.testing.assert_close(found[:, :10] if per_token else found, wanted, atol=1e-12, rtol=1e-12)
    unaware = encoder(per_token, params).double().eval()
    if params.get("pool") != "first":
        shown = unaware(padded)[:, :10] if per_token else unaware(padded)
        assert not torch.allclose(shown, unaware(rows[:, :10]))


def test_a_row_of_padding_only_gives_numbers_and_gradients() -> None:
    model = encoder(per_token=False, pad=PAD)
    rows = token_ids()
    rows[1] = PAD
    logits = model(rows)
    logits.sum().backward()
    assert logits.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_every_token_sees_every_other_one() -> None:
    model = encoder(per_token=True).double().eval()
    rows = token_ids()
    changed = rows.clone()
    changed[:, 9] = 1 + rows[:, 9] % (VOCABULARY - 1)
    assert (model(rows) != model(changed)).any(dim=-1).all()


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({"size": 12}, (12, 768, 12, 3072)),
        ({"layers": 3, "width": 30, "heads": 5, "mlp_width": 7}, (3, 30, 5, 7)),
    ],
)
def test_the_dial_sets_what_is_not_given(params: dict, shape: tuple[int, ...]) -> None:
    spec = EncoderSpec(**params)
    assert (spec.num_layers, spec.num_values, spec.num_heads, spec.num_mlp_values) == shape


@pytest.mark.fault
def test_a_classifier_is_exported_to_onnx_silently_with_the_same_logits(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    column = TokensColumn(name="text", length=LENGTH, vocab_size=VOCABULARY, pad=PAD, tokenizer="0" * 64)
    features = Features(columns=(column,), task="classification", target="y", labels=("a", "b", "c"))
    torch.manual_seed(0)
    model = build_model(ModelSpec(name="encoder", params={**SMALL, "layers": 1}), features.row, 3)
    graph, _ = export(model, features)
    assert tuple(capfd.readouterr()) == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    rows = token_ids(5)
    rows[0, 9:], rows[1] = PAD, PAD
    found = onnxruntime.InferenceSession(graph).run(None, {"text": rows.numpy()})[0]
    with torch.no_grad():
        wanted = model.eval()(rows).softmax(dim=1).numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_names_of_layers_are_stable() -> None:
    names = ["embedding", "block_0", "block_1"]
    assert [name for name, _ in encoder(per_token=True).named_children()] == [*names, "norm", "transform", "head"]
    assert [name for name, _ in encoder(per_token=False).named_children()] == [*names, "pool", "norm", "head"]


@pytest.mark.parametrize(
    ("row", "params", "message"),
    [
        (Row((8, 8)), {}, "encoder needs tokens"),
        (Row((8,), 12), {"max_length": 4}, "max_length 4, but the rows have 8"),
    ],
)
def test_what_does_not_fit_the_data_is_refused(row: Row, params: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelSpec(name="encoder", params=SMALL | params), row, 2)
