"""Open Inference Protocol v2 over JSON: accepted requests, refused requests with their messages, and responses."""

import json
import math
from typing import Any

import numpy as np
import pytest

from maas_ray.bundle.datatypes import NUMPY
from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.errors import BadRequest, NotOffered
from maas_ray.serve.wire import v2
from maas_ray.serve.wire.checks import InferRequest, WantedOutput
from tests.support.infer_bodies import read_infer, write_infer
from tests.support.onnx_models import LINEAR, MIXED, UNBATCHED, make_info

JSON_DATATYPES = [datatype for datatype in NUMPY if datatype not in ("FP16", "BF16")]
SAMPLES: dict[str, list[Any]] = {
    "BOOL": [True, False],
    "BYTES": ["a", "nul\0 and ü and 🙂"],
    "FP32": [1.5, -2],
    "FP64": [1e300, -0.0],
    **{kind: [0, np.iinfo(NUMPY[kind]).max] for kind in NUMPY if NUMPY[kind].kind == "u"},  # type: ignore[type-var]
    **{kind: [np.iinfo(NUMPY[kind]).min, np.iinfo(NUMPY[kind]).max] for kind in NUMPY if NUMPY[kind].kind == "i"},  # type: ignore[type-var]
}


def signature(datatype: str, shape: tuple[int, ...] = (-1, 2), nullable: bool = False) -> Signature:
    tensor = {"datatype": datatype, "shape": shape}
    return Signature.model_validate(
        {"inputs": [{"name": "x", "nullable": nullable, **tensor}], "outputs": [{"name": "y", **tensor}]}
    )


def answer(read: InferRequest, outputs: dict[str, Any], kind: Signature, **more: Any) -> Any:
    body, header_length = write_infer("m", 3, read, outputs, make_info(kind, **more))
    assert header_length is None
    return json.loads(body)


def request(datatype: str = "FP32", shape: Any = (1, 3), data: Any = (1, 2, 3), **more: Any) -> bytes:
    return json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": datatype, "data": data}], **more}).encode()


@pytest.mark.parametrize("datatype", JSON_DATATYPES)
@pytest.mark.parametrize("is_nested", [False, True], ids=["flat", "nested"])
def test_every_datatype_survives_the_way_in_and_out(datatype: str, is_nested: bool) -> None:
    kind = signature(datatype)
    values = [*SAMPLES[datatype], *reversed(SAMPLES[datatype])]
    data = [values[:2], values[2:]] if is_nested else values
    read = read_infer(request(datatype, [2, 2], data), kind)
    assert read.inputs["x"].dtype == NUMPY[datatype]  # type: ignore[index]
    assert read.inputs["x"].shape == (2, 2)
    assert read.num_rows == 2
    written = answer(read, {"y": read.inputs["x"]}, kind)
    assert written["outputs"] == [{"name": "y", "datatype": datatype, "shape": [2, 2], "data": values}]
    assert (written["model_name"], written["model_version"]) == ("m", "3")


def test_the_id_is_echoed_and_absent_where_none_was_given() -> None:
    zeros = {"y": np.zeros((1, 3), np.float32)}
    with_id = read_infer(request(id="42"), LINEAR)
    without = read_infer(request(), LINEAR)
    assert answer(with_id, zeros, LINEAR)["id"] == "42"
    assert "id" not in answer(without, zeros, LINEAR)


def test_nan_and_infinity_in_an_answer_are_null() -> None:
    read = read_infer(request(), LINEAR)
    outputs = {"y": np.array([[np.nan, np.inf, -np.inf]], np.float32)}
    assert answer(read, outputs, LINEAR)["outputs"][0]["data"] == [None, None, None]


def test_an_output_that_is_a_slice_or_a_transpose_is_written_row_major() -> None:
    read = read_infer(request(shape=[2, 3], data=[0] * 6), LINEAR)
    outputs = {"y": np.arange(6, dtype=np.float32).reshape(3, 2).T}
    assert answer(read, outputs, LINEAR)["outputs"][0]["data"] == [0, 2, 4, 1, 3, 5]


def test_null_is_a_missing_value_of_a_nullable_input() -> None:
    body = {
        "inputs": [
            {"name": "age", "shape": [3, 1], "datatype": "FP32", "data": [None, 2, 3.5]},
            {"name": "color", "shape": [3, 1], "datatype": "BYTES", "data": [["red"], [None], [""]]},
        ]
    }
    read = read_infer(json.dumps(body).encode(), MIXED)
    assert list(read.inputs) == ["color", "age"], "inputs come in the signature's order, whatever the request's"
    assert math.isnan(read.inputs["age"][0, 0])
    assert read.inputs["age"][1:].ravel().tolist() == [2.0, 3.5]
    assert read.inputs["color"].ravel().tolist() == ["red", "", ""]


def test_outputs_can_be_chosen_and_come_in_the_order_asked_for() -> None:
    body = {
        "inputs": [
            {"name": "age", "shape": [1, 1], "datatype": "FP32", "data": [1]},
            {"name": "color", "shape": [1, 1], "datatype": "BYTES", "data": ["red"]},
        ]
    }
    some = read_infer(json.dumps({**body, "outputs": [{"name": "shown"}, {"name": "code"}]}).encode(), MIXED)
    assert [output.name for output in some.outputs] == ["shown", "code"]
    every = read_infer(json.dumps(body).encode(), MIXED).outputs
    assert every == tuple(WantedOutput(name, is_binary=False) for name in ("code", "shown", "echo"))


@pytest.mark.parametrize("parameters", [{"note": "x", "size": 1.5, "flag": False, "sequence_id": 0}, {}, None])
def test_unknown_parameters_and_parameters_without_effect_are_accepted(parameters: Any) -> None:
    body = request(parameters=parameters, outputs=[{"name": "y", "parameters": parameters}])
    assert read_infer(body, LINEAR).outputs == (WantedOutput("y", is_binary=False),)


@pytest.mark.parametrize(
    ("parameters", "priority", "timeout_us"),
    [
        (None, 0, None),
        ({"priority": 1}, 1, None),
        ({"timeout": 2500}, 0, 2500),
        ({"timeout": 0, "priority": 0}, 0, None),
    ],
)
def test_priority_and_timeout_are_read(parameters: Any, priority: int, timeout_us: int | None) -> None:
    read = read_infer(request(parameters=parameters), LINEAR)
    assert (read.priority, read.timeout_us) == (priority, timeout_us)


@pytest.mark.parametrize(
    ("parameters", "outputs", "is_binary"),
    [
        ({}, None, False),
        ({"binary_data_output": True}, None, True),
        ({"binary_data_output": True}, [{"name": "y"}], True),
        ({"binary_data_output": True}, [{"name": "y", "parameters": {"binary_data": False}}], False),
        ({}, [{"name": "y", "parameters": {"binary_data": True}}], True),
    ],
)
def test_the_form_of_an_output_is_its_own_or_the_requests(parameters: Any, outputs: Any, is_binary: bool) -> None:
    read = read_infer(request(parameters=parameters, outputs=outputs), LINEAR)
    assert read.outputs == (WantedOutput("y", is_binary),)


def test_of_a_repeated_key_the_last_one_counts() -> None:
    for padding in ("", " " * 3000):  # both ways through the reader
        first = '{"inputs": 1, "inputs": [{"name": "z", "name": "x", "shape": [1, 3], "datatype": "FP32", '
        body = f'{first}"data": [9, 9, 9], "data": [1, 2, 3]}}]{padding}}}'.encode()
        assert read_infer(body, LINEAR).inputs["x"].tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("is_known", [True, False])
def test_nesting_is_limited_wherever_it_is(is_known: bool) -> None:
    codec = v2.InferCodec("m", 1, make_info())
    key = "parameters" if is_known else "junk"
    for depth, fits in ((98, not is_known), (101, False)):
        body = request(**{key: {"a": json.loads("[" * depth + "]" * depth)}})
        if fits:
            assert codec.read(body).num_rows == 1
        else:
            with pytest.raises(BadRequest, match="not a string" if is_known else "nested more than 100 levels deep"):
                codec.read(body)


CLASSES = {"outputs": [{"name": "y", "parameters": {"classification": 2}}]}


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (None, ["3.300000:1", "2.400000:3", "7.000000:0", "7.000000:2"]),
        (("a", "b", "c", "d"), ["3.300000:1:b", "2.400000:3:d", "7.000000:0:a", "7.000000:2:c"]),
        (("a", "b"), ["3.300000:1", "2.400000:3", "7.000000:0", "7.000000:2"]),
    ],
)
def test_the_best_classes_of_each_row_are_strings(labels: tuple[str, ...] | None, expected: list[str]) -> None:
    kind = signature("FP32", (-1, 4))
    read = read_infer(request(shape=[2, 4], data=[0] * 8, **CLASSES), kind)
    scores = np.array([[1.1, 3.3, 0.5, 2.4], [7, -1, 7, np.nan]], np.float32)
    (output,) = answer(read, {"y": scores}, kind, labels=labels)["outputs"]
    assert output == {"name": "y", "datatype": "BYTES", "shape": [2, 2], "data": expected}


@pytest.mark.parametrize(
    ("datatype", "shown"),
    [("UINT8", ["255:1", "3:0"]), ("INT64", ["5:2", "3:0"]), ("FP64", ["5.000000:2", "3.000000:0"])],
)
def test_classes_are_ordered_by_the_datatype_of_the_output(datatype: str, shown: list[str]) -> None:
    kind = signature(datatype, (3,))
    read = read_infer(request(datatype, [3], [0, 0, 0], **CLASSES), kind)
    scores = np.array([3, -1 if datatype != "UINT8" else 255, 5 if datatype != "UINT8" else 0]).astype(NUMPY[datatype])  # type: ignore[index]
    (output,) = answer(read, {"y": scores}, kind)["outputs"]
    assert (output["shape"], output["data"]) == ([2], shown)


def test_more_classes_than_there_are_give_all_of_them() -> None:
    kind = signature("FP32", (-1, 2, 2))
    body = request(shape=[1, 2, 2], data=[0] * 4, outputs=[{"name": "y", "parameters": {"classification": 9}}])
    (output,) = answer(read_infer(body, kind), {"y": np.float32([[[1, 2], [4, 3]]])}, kind)["outputs"]
    assert [entry.partition(":")[2] for entry in output["data"]] == ["2", "3", "1", "0"]
    assert output["shape"] == [1, 4]


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"\xff\xfe", "not JSON"),
    (b"[" * 100_000, "not JSON"),
    (b"[]", "not a JSON object"),
    (b"{}", "no inputs"),
    (b'{"inputs": {}}', "not a list of objects"),
    (b'{"inputs": [1]}', "not a list of objects"),
    (b'{"inputs": []}', "missing input 'x'"),
    (b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[NaN,1,2]}]}', "'NaN'.*null"),
    (b'{"inputs":[{"name":"x","shape":[1,3],"datatype":"FP32","data":[1,-Infinity,2]}]}', "'Infinity'.*null"),
    (request(id=7), "id 7"),
    (request(id="i" * 300), "at most 256"),
    (request(parameters=[]), "not an object"),
    (request(parameters={"a": [1]}), "not a string, number or boolean"),
    (request(parameters={"sequence_id": 3}), "stateful sequences are not supported"),
    (request(outputs=[{"name": "z"}]), "unknown output 'z'; the model's outputs are 'y'"),
    (request(outputs=[{"name": "y"}, {"name": "y"}]), "twice"),
    (request(outputs=[{"name": "y", "parameters": {"classification": -2}}]), "-2, not a non-negative integer"),
    (request(outputs=[{"name": "y", "parameters": {"classification": 2**80}}]), "not a non-negative integer"),
    (request(outputs=[{"name": "y", "parameters": {"binary_data": 2}}]), "'binary_data' of output 'y' is 2, not true"),
    (request(outputs=[{"name": "y", "parameters": {"shared_memory_region": "r"}}]), "shared memory extension is not"),
    (request(parameters={"binary_data_output": "yes"}), "'yes', not true or false"),
    (request(parameters={"priority": "1"}), "'1', not a non-negative integer"),
    (request(parameters={"timeout": -1}), "'timeout' of the request is -1"),
    (request(parameters={"timeout": True}), "is True, not a non-negative"),
    (request(parameters={"headers": "a"}), "'headers' of the request: the name is reserved"),
    (request(parameters={"triton_enable_empty_final_response": True}), "name is reserved by the protocol"),
    (request(parameters={"a": {}}), "not a string, number or boolean"),
    (b'{"inputs":[{"name":"\\ud800","shape":[1,3],"datatype":"FP32","data":[1,2,3]}]}', "not JSON"),
    (b'\xef\xbb\xbf{"inputs":[]}', "not JSON"),
]


@pytest.mark.parametrize(("body", "message"), BAD_BODIES)
def test_a_malformed_request_is_refused_with_its_reason(body: bytes, message: str) -> None:
    with pytest.raises((BadRequest, NotOffered), match=message):
        read_infer(body, LINEAR)


def entry(**changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 3], "datatype": "FP32", "data": [1, 2, 3], **changes}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([entry(name="z")], "unknown input 'z'; the model's inputs are 'x'"),
        ([entry(name=None)], "unknown input None"),
        ([entry(name=["x"])], "unknown input"),
        ([entry(), entry()], "occurs twice"),
        ([entry(datatype="FP64")], "'FP64' is not the model's FP32"),
        ([entry(datatype=None)], "None is not the model's FP32"),
        ([entry(shape=None)], "not a list of non-negative integers"),
        ([entry(shape=[1, -3])], "not a list of non-negative integers"),
        ([entry(shape=[1, 3.0])], "not a list of non-negative integers"),
        ([entry(shape=[True, 3])], "not a list of non-negative integers"),
        ([entry(shape=[3])], r"does not match the model's \[-1, 3\]"),
        ([entry(shape=[1, 1, 3])], "does not match"),
        ([entry(shape=[1, 4])], "does not match"),
        ([entry(shape=[10**9, 3])], "data has 3 elements, shape .* needs 3000000000"),
        ([entry(shape=[2**62, 3])], "needs 13835058055282163712"),
        ([entry(shape=[10**30, 3])], "not a list of non-negative integers"),
        ([entry(shape=[0, 3], data=[])], "no rows"),
        ([entry(data=None)], "data is missing"),
        ([entry(data="abc")], "not a list"),
        ([entry(data=[1, 2])], "data has 2 elements"),
        ([entry(data=[[1, 2]])], "does not match the declared"),
        ([entry(data=[[1, 2, 3], [4, 5, 6]])], "does not match the declared"),
        ([entry(data=[[1, 2, [3]]])], "element 2 is \\[3\\], not a number"),
        ([entry(data=[1, 2, [3]])], "element 2 is \\[3\\], not a number"),
        ([entry(shape=[2, 3], data=[[1, 2, 3], 4])], "nested"),
        ([entry(data=[1, "2", 3])], "element 1 is '2', not a number"),
        ([entry(data=["1", "2", "3"])], "element 0 is '1', not a number"),
        ([entry(data=[1, True, 3])], "element 1 is True, not a number"),
        ([entry(data=[1, None, 3])], "element 1 is null, and this input has no missing values"),
        ([entry(data=[1, {}, 3])], "element 1 is {}, not a number"),
        ([entry(data=[1, 1e39, 3])], "element 1 is 1e\\+39, out of range for FP32"),
        ([entry(parameters={"binary_data_size": 12}, data=None)], "no inference-header-content-length"),
        ([entry(parameters={"shared_memory_region": "r"})], "shared memory extension is not supported"),
    ],
)
def test_an_input_that_does_not_fit_is_named_with_value_limit_and_way_out(inputs: Any, message: str) -> None:
    with pytest.raises((BadRequest, NotOffered), match=message):
        read_infer(json.dumps({"inputs": inputs}).encode(), LINEAR)


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("INT32", [1, 2.5], "not an integer"),
        ("INT8", [1, 128], "element 1 is 128, out of range for INT8"),
        ("UINT8", [-1, 1], "element 0 is -1, out of range for UINT8"),
        ("INT64", [1, 2**63], "out of range for INT64"),
        ("INT64", [-1, 2**63], "out of range for INT64|not an integer"),
        ("UINT64", [1, 2**64], "out of range for UINT64"),
        ("INT64", [1, False], "element 1 is False, not a number"),
        ("INT64", [1, None], "element 1 is null"),
        ("BOOL", [1, 2], "element 1 is 2, not true or false"),
        ("BYTES", ["a", 1], "element 1 is 1, not a string"),
        ("BYTES", ["a", None], "element 1 is null"),
        ("BYTES", ["a", ["b"]], "element 1 is \\['b'\\], not a string"),
        ("FP16", [1, 2], "FP16 has no JSON form"),
    ],
)
def test_values_outside_their_datatype_are_refused(datatype: str, data: list[Any], message: str) -> None:
    with pytest.raises((BadRequest, NotOffered), match=message):
        read_infer(request(datatype, [1, 2], data), signature(datatype))


def test_a_nullable_integer_has_no_missing_value() -> None:
    with pytest.raises(BadRequest, match="INT64 has no missing value"):
        read_infer(request("INT64", [1, 2], [1, None]), signature("INT64", nullable=True))


def test_inputs_that_differ_in_rows_are_refused() -> None:
    body = {
        "inputs": [
            {"name": "age", "shape": [2, 1], "datatype": "FP32", "data": [1, 2]},
            {"name": "color", "shape": [1, 1], "datatype": "BYTES", "data": ["red"]},
        ]
    }
    with pytest.raises(BadRequest, match="have different numbers of rows: 'color' has 1, 'age' has 2"):
        read_infer(json.dumps(body).encode(), MIXED)


def test_a_model_without_a_batch_dimension_counts_as_one_row() -> None:
    body = {"inputs": [{"name": "v", "shape": [4], "datatype": "FP32", "data": [1, 2, 3, 4]}]}
    assert read_infer(json.dumps(body).encode(), UNBATCHED).num_rows == 1


def test_an_empty_size_beyond_the_batch_dimension_is_allowed() -> None:
    kind = signature("FP32", (-1, -1))
    codec = v2.InferCodec("m", 1, make_info(kind))
    for data in ([], [], [], [[], []]):
        assert codec.read(request(shape=[2, 0], data=data)).inputs["x"].shape == (2, 0)


@pytest.mark.parametrize("datatype", ["BOOL", "BYTES"])
def test_outputs_without_an_order_have_no_classes(datatype: str) -> None:
    kind = signature(datatype)
    with pytest.raises(BadRequest, match=f"'y' is {datatype}, which has no classes"):
        read_infer(request(datatype, [1, 2], SAMPLES[datatype], **CLASSES), kind)


def test_the_table_of_tensors_covers_every_datatype_of_the_specs() -> None:
    assert set(NUMPY) == set(TensorSpec.model_fields["datatype"].annotation.__args__)  # type: ignore[union-attr]
