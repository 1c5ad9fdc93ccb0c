import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.errors import BundleError
from maas_ray.export import onnx_export as export_module
from maas_ray.export.onnx_export import ServedModel, build_signature, export
from maas_ray.export.parity import check_parity
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from tests.export.conftest import CASES, Case

Cases = Callable[[str], Case]

ONE_NUMBER = Features(columns=(NumericColumn(name="x", shift=1.0),), task="regression", target="y")


def test_inputs_are_the_raw_columns_and_outputs_do_not_take_a_columns_name(cases: Cases) -> None:
    case = cases("mixed")
    assert [(spec.name, spec.datatype, spec.shape, spec.nullable) for spec in case.signature.inputs] == [
        ("age in years", "FP32", (-1, 1), True),
        ("port.of.départ", "BYTES", (-1, 1), True),
        ("class", "INT64", (-1, 1), False),
        ("net.1.weight", "FP32", (-1, 1), False),
        ("value_3", "BYTES", (-1, 1), False),
    ]
    assert [(spec.name, spec.datatype, spec.shape) for spec in case.signature.outputs] == [
        ("probabilities", "FP32", (-1, 3)),
        ("predicted_class", "INT64", (-1,)),
    ]


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("digits", [("probabilities", "FP32", (-1, 10)), ("class", "INT64", (-1,))]),
        ("binary", [("probability", "FP32", (-1, 1)), ("class", "INT64", (-1,))]),
        ("regression", [("prediction", "FP32", (-1, 1))]),
    ],
)
def test_the_task_gives_the_outputs(name: str, outputs: list, cases: Cases) -> None:
    signature = cases(name).signature
    assert [(spec.name, spec.datatype, spec.shape) for spec in signature.outputs] == outputs
    assert signature.is_batched


def test_the_graph_answers_raw_values_as_training_saw_them(cases: Cases) -> None:
    case = cases("mixed")
    session = onnxruntime.InferenceSession(case.graph, providers=["CPUExecutionProvider"])

    def ask(age: float, port: str, size: int, level: str) -> np.ndarray:
        raw = [np.array([[value]], kind) for value, kind in ((age, np.float32), (port, object), (size, np.int64))]
        columns = [*raw, np.array([[5.0]], np.float32), np.array([[level]], object)]
        names = [spec.name for spec in case.signature.inputs]
        return session.run(["probabilities"], dict(zip(names, columns, strict=True)))[0]

    np.testing.assert_array_equal(ask(np.nan, "C", 1, "low"), ask(29.5, "C", 1, "low"))  # the fill of the column
    np.testing.assert_array_equal(ask(20, "", 1, "low"), ask(20, "S", 1, "low"))  # likewise: code 2
    np.testing.assert_array_equal(ask(20, "atlantis", 1, "low"), ask(20, "elsewhere", 1, "low"))
    np.testing.assert_array_equal(ask(20, "C", 7, "low"), ask(20, "C", -1, "low"))
    assert (ask(20, "atlantis", 1, "low") != ask(20, "S", 1, "low")).any()
    assert (ask(20, "Québec", 1, "low") != ask(20, "S", 1, "low")).any()


def test_export_leaves_the_net_unchanged() -> None:
    net = nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    export(net, ONE_NUMBER)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


SCRIPT = """
import sys
from pathlib import Path
import torch
from maas_ray.data.spec.features import Features
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.export.onnx_export import export

features = Features.model_validate_json(sys.argv[1])
torch.manual_seed(3)
net = build_model(ModelSpec(name="mlp", params={"activation": "gelu", "dropout": 0.5}), features.row, 3)
Path(sys.argv[2]).write_bytes(export(net, features)[0])
"""
TRACES = (b".py", b"/work", b"/home", b"/tmp", os.fsencode(Path.home()), b"torch", b"File")


def test_a_net_is_exported_to_the_same_bytes_again_without_a_trace_of_the_machine(cases: Cases) -> None:
    case = cases("binary")
    assert export(case.net, case.features)[0] == case.graph
    for trace in TRACES:
        assert trace not in case.graph


@pytest.mark.fault
def test_another_process_exports_the_same_bytes_silently_and_without_a_trace_of_the_machine(tmp_path: Path) -> None:
    features = CASES["mixed"]()[0]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, features.model_dump_json(), str(tmp_path / "model.onnx")],
        env=os.environ | {"PYTHONHASHSEED": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    torch.manual_seed(3)
    spec = ModelSpec(name="mlp", params={"activation": "gelu", "dropout": 0.5})
    graph, _ = export(build_model(spec, features.row, 3), features)
    assert (tmp_path / "model.onnx").read_bytes() == graph
    for trace in TRACES:
        assert trace not in graph


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_inside_and_only_standard_operators_are_used(name: str, cases: Cases) -> None:
    model = onnx.load_from_string(cases(name).graph)
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx.ml"}
    assert not model.functions
    assert not model.metadata_props
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)


class FirstOnly(nn.Module):
    """Ignores all columns but the first."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1]


class Branching(nn.Module):
    """Uses a branch on the values, with a look at a value from outside in each branch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = self.linear(x)
        return torch.cond(x.sum() > -1e30, lambda s, v: s + v[:, :1], lambda s, v: s - v[:, :1], (logits, x))


@pytest.mark.parametrize("net", [FirstOnly(), nn.Linear(2, 1), Branching()], ids=lambda net: type(net).__name__)
def test_columns_that_the_net_ignores_or_uses_in_a_branch_stay_inputs(net: nn.Module) -> None:
    columns = (
        CategoricalColumn(name="a", categories=("x", "y"), encoding="ordinal"),
        NumericColumn(name="b", fill=0.0),
    )
    features = Features(columns=columns, task="regression", target="y")
    graph, signature = export(net, features)
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == [spec.name for spec in signature.inputs] == ["a", "b"]
    check_parity(net, features, graph, [np.array([["x"]], object), np.ones((1, 1), np.float32)])


def test_a_net_that_returns_its_input_is_exported() -> None:
    features = Features(columns=(TensorColumn(name="x", shape=(1,)),), task="regression", target="y")
    graph, _ = export(nn.Identity(), features)
    assert check_parity(nn.Identity(), features, graph, [np.ones((3, 1), np.float32)])["max_abs_error"] == 0.0


class Specialised(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ones(len(x.tolist()), 1)


class Folding(nn.Module):
    """Works for even numbers of rows only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.reshape(-1, 2).flip(1).reshape(-1, 1)


class Untraceable(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


@pytest.mark.parametrize("net", [Specialised(), Folding(), Untraceable()], ids=lambda net: type(net).__name__)
def test_a_net_that_cannot_be_traced_for_any_number_of_rows_is_refused(net: nn.Module) -> None:
    with pytest.raises(
        BundleError, match=rf"{type(net).__name__} cannot be exported to ONNX at test_onnx_export.py:\d+ .*a graph "
    ):
        export(net, ONE_NUMBER)


def test_a_model_larger_than_a_graph_may_be_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export_module, "MAX_GRAPH_BYTES", 7)
    with pytest.raises(BundleError, match="8 bytes of weights; the limit for an ONNX graph is 7 bytes"):
        export(nn.Linear(1, 1), ONE_NUMBER)


@pytest.mark.parametrize("names", [("x", "x"), ("x", "")])
def test_columns_of_one_name_are_refused(names: tuple[str, str]) -> None:
    features = Features(columns=tuple(NumericColumn(name=name) for name in names), task="regression", target="y")
    with pytest.raises(BundleError, match="distinct names that are not empty"):
        build_signature(features)


def test_a_served_binary_model_gives_the_class_of_its_own_probability() -> None:
    features = Features(columns=(NumericColumn(name="x"),), task="binary", target="y", labels=("no", "yes"))
    probability, code = ServedModel(nn.Identity(), features)(torch.tensor([[-3.0], [0.0], [2.0]]))
    torch.testing.assert_close(probability, torch.tensor([[-3.0], [0.0], [2.0]]).sigmoid())
    assert code.tolist() == [0, 1, 1]
