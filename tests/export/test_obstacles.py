"""What a user is told about a model without a servable graph: the line, the reason and the fix."""

import pytest
import torch
from torch import nn

from maas_ray.data.loading.encode import encode_columns
from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn, TokensColumn
from maas_ray.data.stored.random_rows import draw_rows
from maas_ray.errors import BundleError, GateError
from maas_ray.export.check import check_export
from maas_ray.export.column_names import refuse_names
from maas_ray.export.onnx_export import build_served, export
from maas_ray.export.row_mixing import explain_differences
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec

TABLE = Features(
    columns=(
        NumericColumn(name="a"),
        NumericColumn(name="b"),
        CategoricalColumn(name="c", categories=("x", "y", "z"), encoding="ordinal"),
    ),
    task="classification",
    target="t",
    labels=("no", "yes"),
)
TEXT = Features(
    columns=(TokensColumn(name="text", length=6, vocab_size=9, tokenizer="0" * 64, pad=0),),
    task="classification",
    target="t",
    labels=("no", "yes"),
)


def build(name: str, features: Features = TABLE, **params: object) -> nn.Module:
    torch.manual_seed(0)
    spec = ModelSpec(name=f"tests.support.unexportable:{name}", params=params)
    return build_model(spec, features.row, features.num_outputs, per_token=features.is_per_token)


@pytest.mark.parametrize(
    ("name", "line", "fix"),
    [
        ("Experts", "if rows.numel():", "torch.where"),
        ("EarlyExit", "if x.abs().mean() > 0.5:", "torch.cond"),
        ("WithNumpy", "self.first(x).detach().numpy()", "NumPy cannot be traced"),
        ("TwoRows", "self.first(x).view(2, -1)", "use -1 or x.shape[0]"),
        ("Bessel", "torch.special.i1(self.first(x))", "no ONNX equivalent"),
        ("Packed", "self.lstm(packed)", "a mask"),
    ],
)
def test_the_line_of_the_module_and_the_fix_are_named(
    name: str, line: str, fix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    features = TEXT if name == "Packed" else TABLE
    with pytest.raises(BundleError) as caught:
        export(build(name, features), features)
    message = str(caught.value)
    assert f"{name} cannot be exported to ONNX at unexportable.py:" in message
    assert line in message
    assert fix in message
    assert capfd.readouterr() == ("", ""), "torch's own dump of the graph is not shown"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "BatchMean",
            "mixes the rows of a batch: the result for a row depends on the other rows, in forward of BatchMean",
        ),
        ("NoRunningStatistics", "mixes the rows of a batch: it fails on a single row: ValueError"),
        ("AttendsToRows", "depends on the other rows, in the layer 'attention' (MultiheadAttention)"),
        ("AlwaysDropout", "gives different results for the same rows in evaluation mode, in forward of AlwaysDropout"),
        ("Counting", "gives different results for the same rows in evaluation mode, in forward of Counting"),
        ("Fine", None),
    ],
)
def test_a_model_whose_results_vary_is_told_from_a_wrong_graph(name: str, reason: str | None) -> None:
    net = build(name)
    columns = [torch.from_numpy(column) for column in encode_columns(TABLE, draw_rows(TABLE, 8, 0))]
    served = build_served(net, TABLE)
    buffers = {key: buffer.clone() for key, buffer in served.named_buffers()}
    found = explain_differences(served, columns, name)
    assert found is None if reason is None else reason in str(found)
    assert all(torch.equal(buffer.nan_to_num(), buffers[key].nan_to_num()) for key, buffer in served.named_buffers())


def test_the_check_and_the_publication_give_one_reason() -> None:
    with pytest.raises(GateError, match="BatchMean mixes the rows of a batch"):
        check_export(build("BatchMean"), TABLE, [column[:0] for column in draw_rows(TABLE, 2, 0)])


def test_a_model_without_a_row_for_unknown_categories_is_refused_before_training() -> None:
    rows = draw_rows(TABLE, 8, 1)
    with pytest.raises(GateError, match=r"fails on some of the rows.*IndexError.*at unexportable.py:.*unknown: code"):
        check_export(build("Codes"), TABLE, rows)
    check_export(build("Codes", extra=1), TABLE, rows)


@pytest.mark.parametrize(
    ("names", "message"), [(("", "b"), "a column has no name"), (("b", "b"), "'b' is the name of several")]
)
def test_columns_that_cannot_be_inputs_are_named(names: tuple[str, ...], message: str) -> None:
    features = TABLE.model_copy(update={"columns": tuple(NumericColumn(name=name) for name in names)})
    with pytest.raises(BundleError, match=f"{message}.*data.features"):
        refuse_names(features)


def test_no_way_out_is_named_that_is_refused_next() -> None:
    features = TEXT.model_copy(update={"task": "language_modeling", "labels": None})
    with pytest.raises(BundleError) as own:
        export(build("Tokens", features), features)
    assert "has no Hugging Face format either" in str(own.value)
    assert "checkpoints reshard" in str(own.value)
    decoder = build_model(
        ModelSpec(name="decoder", params={"size": 1}), features.row, features.num_outputs, per_token=True
    )
    with pytest.raises(BundleError, match="`maas-ray checkpoints export` writes it in Hugging Face's format"):
        export(decoder, features)
