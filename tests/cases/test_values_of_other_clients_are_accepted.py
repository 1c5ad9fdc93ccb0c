"""Values sent by clients of other servers (1.0 for an integer, null parameters, deep lists) got 500 or a
refusal."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import orjson
import pytest

from maas_ray.bundle.format import Datatype, Signature, TensorSpec
from maas_ray.errors import BadRequest
from tests.support.infer_bodies import read_infer


def signature(datatype: Datatype, shape: Sequence[int]) -> Signature:
    tensor = TensorSpec(name="x", datatype=datatype, shape=tuple(shape))
    return Signature(inputs=(tensor,), outputs=(tensor,))


def body(datatype: str, shape: Any, data: Any, **more: Any) -> bytes:
    tensor = {"name": "x", "datatype": datatype, "shape": shape, "data": data}
    return orjson.dumps({"inputs": [{**tensor, **more.pop("tensor", {})}], **more})


def nested(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("padding", ["", " " * 4096], ids=["small", "large"])
@pytest.mark.parametrize("datatype", ["FP32", "INT64", "BOOL", "BYTES"])
@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
@pytest.mark.parametrize("depth", [1, 2, 3, 7, 100, 250])
def test_lists_that_are_not_nested_as_their_shape_are_refused(
    padding: str, datatype: Datatype, shape: list[int], depth: int
) -> None:
    value = {"FP32": 2.5, "INT64": 2, "BOOL": True, "BYTES": "a"}[datatype]
    text = body(datatype, shape, nested(value, depth)) + padding.encode()
    if depth in (1, len(shape)):
        assert read_infer(text, signature(datatype, shape)).inputs["x"].tolist() == nested(value, len(shape))
    else:
        with pytest.raises(BadRequest):
            read_infer(text, signature(datatype, shape))


@pytest.mark.parametrize("depth", [400, 1023, 1024, 2000, 100_000])
@pytest.mark.parametrize("where", ["data", "shape", "parameters", "extra"])
def test_no_depth_of_nesting_is_more_than_a_refusal(depth: int, where: str) -> None:
    deep = "[" * depth + "2" + "]" * depth
    fields = {"data": "[1]", "shape": "[]", where: deep}
    rest = ",".join(f'"{key}":{value}' for key, value in fields.items())
    text = f'{{"inputs":[{{"name":"x","datatype":"FP32",{rest}}}]}}'
    with pytest.raises(BadRequest):
        read_infer(text.encode(), signature("FP32", []))


@pytest.mark.parametrize("datatype", ["INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"])
@pytest.mark.parametrize("count", [2, 2000])
def test_integers_may_be_sent_as_floats_that_are_whole(datatype: Datatype, count: int) -> None:
    given = [1.0, 0.0] * (count // 2)
    assert read_infer(body(datatype, [count], given), signature(datatype, [count])).inputs["x"].tolist() == given
    mixed = [1, 0.0] * (count // 2)
    assert read_infer(body(datatype, [count], mixed), signature(datatype, [count])).inputs["x"].tolist() == mixed


@pytest.mark.parametrize(
    ("datatype", "value"), [("INT8", 1.5), ("INT8", 128.0), ("UINT64", -1.0), ("UINT64", 2.0**64), ("INT64", 1e300)]
)
def test_floats_that_are_not_integers_of_the_datatype_are_refused(datatype: Datatype, value: float) -> None:
    with pytest.raises(BadRequest, match="element 1 is"):
        read_infer(body(datatype, [2], [0.0, value]), signature(datatype, [2]))


def test_the_largest_integers_among_floats_stay_exact() -> None:
    given = [2**64 - 1, 0.0, 1]
    assert read_infer(body("UINT64", [3], given), signature("UINT64", [3])).inputs["x"].tolist() == [2**64 - 1, 0, 1]


def test_booleans_may_be_sent_as_numbers() -> None:
    given = [True, 1, 1.0, 0, 0.0, False]
    found = read_infer(body("BOOL", [6], given), signature("BOOL", [6])).inputs["x"]
    assert found.dtype == np.bool_
    assert found.tolist() == [True, True, True, False, False, False]


@pytest.mark.parametrize("value", [2, -1, 0.5, "true", None])
def test_other_values_are_not_booleans(value: object) -> None:
    with pytest.raises(BadRequest, match="element 1 is"):
        read_infer(body("BOOL", [2], [True, value]), signature("BOOL", [2]))


@pytest.mark.parametrize(
    "more",
    [
        {"parameters": {"priority": None, "timeout": None, "binary_data_output": None, "mine": None}},
        {"parameters": {"sequence_id": None, "triton_x": None}},
        {"parameters": {"priority": 0.0, "binary_data_output": 0}},
        {"tensor": {"parameters": {"binary_data_size": None, "mine": None}}},
        {"outputs": [{"name": "x", "parameters": {"binary_data": None, "classification": None}}]},
        {"outputs": [{"name": "x", "parameters": None}], "id": None},
    ],
)
def test_parameters_that_are_null_are_as_if_they_were_not_there(more: dict[str, Any]) -> None:
    plain = read_infer(body("FP32", [1], [1]), signature("FP32", [1]))
    found = read_infer(body("FP32", [1], [1], **more), signature("FP32", [1]))
    assert (found.outputs, found.priority, found.timeout_us) == (plain.outputs, plain.priority, plain.timeout_us)
