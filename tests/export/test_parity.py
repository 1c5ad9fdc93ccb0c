import json
from collections.abc import Callable

import numpy as np
import onnx
import pytest
import torch
from onnx import ModelProto, helper, numpy_helper
from torch import nn

from maas_ray.errors import GateError, SpecError
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import ParitySpec, check_parity
from maas_ray.spec import parse_spec
from tests.export.conftest import CASES, Case

Cases = Callable[[str], Case]


@pytest.mark.parametrize("name", CASES)
def test_a_faithful_graph_passes_with_a_report_that_json_can_hold(name: str, cases: Cases) -> None:
    case = cases(name)
    report = json.loads(json.dumps(check_parity(case.net, case.features, case.graph, case.rows), allow_nan=False))
    assert report["passed"] is True
    assert report["batch_sizes"] == [1, 3, 17, 64]
    assert (report["num_rows"], report["num_random"]) == (report["num_real"] + 128, 128)
    assert 0 <= report["max_abs_error"] < (5 if name == "regression" else 1e-5)
    assert report["top1_agreement"] == (None if name == "regression" else 1.0)
    assert report["versions"]["opsets"]["ai.onnx"] == 18


def test_the_gate_runs_without_real_rows_and_leaves_the_net_in_its_mode(cases: Cases) -> None:
    case = cases("mixed")
    case.net.train()
    report = check_parity(case.net, case.features, case.graph, [column[:0] for column in case.rows])
    assert (report["num_real"], report["num_random"]) == (0, 128)
    assert case.net.training


def edited(graph: bytes, edit: Callable[[ModelProto], None]) -> bytes:
    model = onnx.load_from_string(graph)
    edit(model)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def add_to_tensor(name: str, place: int, amount: float) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith(name))
        values = numpy_helper.to_array(tensor).copy()
        values.flat[place] += amount
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


def label_encoder(model: ModelProto, column: str) -> onnx.NodeProto:
    return next(node for node in model.graph.node if node.op_type == "LabelEncoder" and node.input[0] == column)


def edit_list(column: str, attribute: str, change: Callable[[list], list]) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        node = label_encoder(model, column)
        old = next(entry for entry in node.attribute if entry.name == attribute)
        new = helper.make_attribute(attribute, change(helper.get_attribute_value(old)))
        node.attribute.remove(old)
        node.attribute.append(new)

    return edit


def swap(first: int, second: int) -> Callable[[list], list]:
    def change(values: list) -> list:
        values = list(values)
        values[first], values[second] = values[second], values[first]
        return values

    return change


def retype_encoder_default(model: ModelProto) -> None:
    for entry in label_encoder(model, "port.of.départ").attribute:
        if entry.name == "default_int64":
            entry.i = 0


def rename_output(model: ModelProto) -> None:
    for node in model.graph.node:
        node.output[:] = ["scores" if name == "probabilities" else name for name in node.output]
        node.input[:] = ["scores" if name == "probabilities" else name for name in node.input]
    model.graph.output[0].name = "scores"


def smallest_argmax(model: ModelProto) -> None:
    next(node for node in model.graph.node if node.op_type == "ArgMax").op_type = "ArgMin"


def widen_output(model: ModelProto) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.output[0] = "narrow"
    model.graph.node.append(helper.make_node("Cast", ["narrow"], ["probabilities"], to=onnx.TensorProto.DOUBLE))
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    arg_max = next(node for node in model.graph.node if node.op_type == "ArgMax")
    arg_max.input[0] = "narrow"


FAULTS = {
    "a weight of the net": (
        "mixed",
        add_to_tensor("net.head.weight", 7, 1e-2),
        "output 'probabilities', batch size 1, ",
    ),
    "a bias of the net": ("mixed", add_to_tensor("net.head.bias", 0, 1e-3), "output 'probabilities'"),
    "a weight of a convolution": ("digits", add_to_tensor("net.stage_0.0.weight", 3, 1e-2), "output 'probabilities'"),
    "a weight before a binary head": ("binary", add_to_tensor("net.head.weight", 5, 1e-2), "output 'probability'"),
    "a bias in the unit of a price": ("regression", add_to_tensor("net.head.bias", 0, 10.0), r"limit .*atol 1e-05"),
    "the scale of one column": ("mixed", add_to_tensor(".scale", 0, 0.02), "output 'probabilities'"),
    "the shift of one column": ("mixed", add_to_tensor(".shift", 0, 0.5), "output 'probabilities'"),
    "the fill of a missing number": (
        "mixed",
        add_to_tensor(".fill", 0, 0.5),
        "output 'probabilities'",
    ),
    "two categories": ("mixed", edit_list("port.of.départ", "keys_strings", swap(0, 1)), "output 'probabilities'"),
    "two integer categories": ("mixed", edit_list("class", "keys_int64s", swap(1, 2)), "output 'probabilities'"),
    "two codes": ("mixed", edit_list("value_3", "values_int64s", swap(0, 2)), "output 'probabilities'"),
    "the code of a missing value": (
        "mixed",
        edit_list("port.of.départ", "values_int64s", lambda codes: [*codes[:-1], 0]),
        "output 'probabilities'",
    ),
    "the code of unknown categories": ("mixed", retype_encoder_default, "random row"),
    "the class": ("digits", smallest_argmax, "output 'class', batch size 1, real row 0: .*must be equal"),
    "an output's name": ("digits", rename_output, "the outputs of the graph are .*'scores'"),
    "an output's type": ("digits", widen_output, r"tensor\(double\)"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_catches_a_graph_with_another(fault: str, cases: Cases) -> None:
    name, edit, message = FAULTS[fault]
    case = cases(name)
    with pytest.raises(GateError, match=message):
        check_parity(case.net, case.features, edited(case.graph, edit), case.rows)


def test_a_tolerance_accepts_smaller_errors_and_the_report_contains_the_largest(cases: Cases) -> None:
    case = cases("mixed")
    graph = edited(case.graph, add_to_tensor("net.head.bias", 0, 1e-3))
    report = check_parity(case.net, case.features, graph, case.rows, ParitySpec(atol=1e-3))
    assert 1e-5 < report["max_abs_error"] < 1e-3
    assert report["tolerance"] == {"atol": 1e-3, "rtol": 1e-4}


def test_the_gate_catches_not_a_number_on_one_side(cases: Cases) -> None:
    case = cases("mixed")
    graph = edited(case.graph, add_to_tensor(".fill", 0, float("nan")))
    with pytest.raises(GateError, match=r"onnxruntime returns nan"):
        check_parity(case.net, case.features, graph, case.rows)


@pytest.mark.filterwarnings("ignore:.*:torch.jit.TracerWarning")
def test_the_gate_refuses_a_graph_that_is_tied_to_a_number_of_rows(cases: Cases) -> None:
    def declare(model: ModelProto) -> None:
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2

    def reshape(model: ModelProto) -> None:
        """The declaration says any number of rows, the computation 17 or a multiple of it."""
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 17, 10]), "fixed"))
        model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 10]), "back"))
        soft_max = next(node for node in model.graph.node if node.op_type == "Softmax")
        scores = soft_max.input[0]
        soft_max.input[0] = "flat"
        place = list(model.graph.node).index(soft_max)
        model.graph.node.insert(place, helper.make_node("Reshape", ["folded", "back"], ["flat"]))
        model.graph.node.insert(place, helper.make_node("Reshape", [scores, "fixed"], ["folded"]))

    case = cases("digits")
    with pytest.raises(GateError, match=r"a fixed number of 2 row\(s\): 'image'"):
        check_parity(case.net, case.features, edited(case.graph, declare), case.rows)
    with pytest.raises(GateError, match=r"cannot be run with 1 row\(s\)"):
        check_parity(case.net, case.features, edited(case.graph, reshape), case.rows)


class Centered(nn.Module):
    """Scores depend on the other rows of the batch, so that a batcher would change answers."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.output = nn.Linear(num_in, num_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.output(x - x.mean(dim=0))


def test_the_gate_refuses_a_model_whose_rows_depend_on_each_other(cases: Cases) -> None:
    case = cases("binary")
    torch.manual_seed(0)
    net = Centered(4, 1)
    graph, _ = export(net, case.features)
    with pytest.raises(GateError, match="output 'probability', batch size 1"):
        check_parity(net, case.features, graph, case.rows)


def test_bytes_without_a_graph_are_refused(cases: Cases) -> None:
    case = cases("binary")
    with pytest.raises(GateError, match="onnxruntime cannot load"):
        check_parity(case.net, case.features, case.graph[: len(case.graph) // 2], case.rows)


@pytest.mark.parametrize("sizes", [[1, 2], [0], []])
def test_a_batch_size_that_proves_nothing_is_refused(sizes: list[int]) -> None:
    with pytest.raises(SpecError, match="batch_sizes"):
        parse_spec(ParitySpec, {"batch_sizes": sizes})
