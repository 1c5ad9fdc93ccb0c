"""Binary tensor extension: reads without a copy, and every kind of wrong length."""

import json
import struct
from typing import Any

import numpy as np
import pytest

from maas_ray.bundle.format import Signature
from maas_ray.errors import BadRequest
from maas_ray.serve.wire import v2
from maas_ray.serve.wire.binary import body_buffer, read_header_length
from maas_ray.serve.wire.checks import WantedOutput
from tests.support.infer_bodies import read_infer
from tests.support.onnx_models import LINEAR, MIXED, make_info

ROW = np.float32([[1, 2, 3]])


def signature(datatype: str, shape: tuple[int, ...]) -> Signature:
    tensor = {"datatype": datatype, "shape": shape}
    return Signature.model_validate({"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]})


def entry(size: Any = 12, **changes: Any) -> dict[str, Any]:
    return {"name": "x", "shape": [1, 3], "datatype": "FP32", "parameters": {"binary_data_size": size}, **changes}


def packed(tail: bytes, *entries: dict[str, Any], **more: Any) -> tuple[bytes, int]:
    header = json.dumps({"inputs": entries or [entry()], **more}).encode()
    return header + tail, len(header)


def text(*elements: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def test_a_tensor_is_used_where_it_was_received() -> None:
    body, header_length = packed(ROW.tobytes())
    buffer = body_buffer(len(body), header_length)
    buffer[:] = body
    codec = v2.InferCodec("m", 1, make_info())
    for _ in range(3):  # the third one by a plan
        array = codec.read(buffer, header_length).inputs["x"]
        assert not array.flags.owndata
        assert array.flags.aligned
        assert array.tobytes() == ROW.tobytes()


@pytest.mark.parametrize("padding", range(4))
def test_an_unaligned_tensor_is_copied(padding: int) -> None:
    body, header_length = packed(ROW.tobytes(), id="i" * padding)
    codec = v2.InferCodec("m", 1, make_info())
    for _ in range(3):
        array = codec.read(body, header_length).inputs["x"]
        assert array.flags.aligned
        np.testing.assert_array_equal(array, ROW)


def test_inputs_come_in_the_order_of_the_json_and_may_be_json_themselves() -> None:
    age = {"name": "age", "shape": [2, 1], "datatype": "FP32", "parameters": {"binary_data_size": 8}}
    color = {"name": "color", "shape": [2, 1], "datatype": "BYTES"}
    strings = text(b"red", "grün\0".encode())
    sized = {"parameters": {"binary_data_size": len(strings)}}
    ages = np.float32([np.nan, 4]).tobytes()
    codec = v2.InferCodec("m", 1, make_info(MIXED))
    for body, header_length in (
        packed(ages + strings, age, {**color, **sized}),
        packed(strings + ages, {**color, **sized}, age),
        packed(ages, age, {**color, "data": ["red", "grün\0"]}),
    ) * 3:
        read = codec.read(body, header_length)
        assert list(read.inputs) == ["color", "age"]
        assert read.inputs["color"].ravel().tolist() == ["red", "grün\0"]
        np.testing.assert_array_equal(read.inputs["age"], np.float32([[np.nan], [4]]))


def test_an_answer_may_be_half_json_and_half_binary() -> None:
    zero = {"color": text(b""), "age": np.float32([0]).tobytes()}
    entries = [
        {"name": name, "shape": [1, 1], "datatype": datatype, "parameters": {"binary_data_size": len(zero[name])}}
        for name, datatype in (("color", "BYTES"), ("age", "FP32"))
    ]
    wanted = [{"name": "echo", "parameters": {"binary_data": True}}, {"name": "shown"}, {"name": "code", "parameters": {"binary_data": True}}]  # fmt: skip
    body, header_length = packed(b"".join(zero.values()), *entries, outputs=wanted, id="q")
    codec = v2.InferCodec("m", 7, make_info(MIXED))
    outputs: dict[str, Any] = {
        "echo": np.array([["hä"]], object),
        "shown": np.float32([[1.5]]),
        "code": np.array([[9]]),
    }
    answer = codec.write(codec.read(body, header_length), outputs)
    assert answer.header_length is not None
    assert json.loads(answer.body[: answer.header_length]) == {
        "model_name": "m",
        "model_version": "7",
        "id": "q",
        "outputs": [
            {"name": "echo", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 7}},
            {"name": "shown", "datatype": "FP32", "shape": [1, 1], "data": [1.5]},
            {"name": "code", "datatype": "INT64", "shape": [1, 1], "parameters": {"binary_data_size": 8}},
        ],
    }
    assert answer.body[answer.header_length :] == text("hä".encode()) + (9).to_bytes(8, "little")


@pytest.mark.parametrize(
    ("datatype", "shape", "body", "expected"),
    [
        ("FP32", (-1, 3), ROW.tobytes(), [[1, 2, 3]]),
        ("INT64", (-1, -1), b"\1" + bytes(15), [[1, 0]]),
        ("UINT8", (2, -1), b"abcd", [[97, 98], [99, 100]]),
        ("BYTES", (-1, 1), "grün".encode(), [["grün"]]),
        ("BYTES", (1,), b"", [""]),
    ],
)
def test_a_raw_body_is_the_only_input_as_one_row(
    datatype: str, shape: tuple[int, ...], body: bytes, expected: Any
) -> None:
    kind = signature(datatype, shape)
    codec = v2.InferCodec("m", 1, make_info(kind))
    read = codec.read(body, 0)
    assert read.inputs["x"].tolist() == expected
    assert read.outputs == (WantedOutput("y", is_binary=True),)
    assert codec.write(read, {"y": read.inputs["x"]}).header_length is not None


@pytest.mark.parametrize(
    ("kind", "body", "message"),
    [
        (LINEAR, bytes(11), r"11 bytes of binary data, shape \[1, 3\] of FP32 needs 12"),
        (LINEAR, b"", "needs 12"),
        (MIXED, bytes(8), "needs a model with one input, this model has 'color', 'age'"),
        (signature("FP32", (-1, -1, -1)), bytes(8), "cannot define the 2 variable sizes"),
        (signature("FP32", (-1, -1, 3)), bytes(16), "not a multiple of the 12"),
        (signature("BYTES", (-1, 2)), b"ab", "one element of BYTES"),
    ],
)
def test_a_raw_body_that_does_not_fit_is_refused(kind: Signature, body: bytes, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        read_infer(body, kind, 0)


BAD: list[tuple[tuple[bytes, int], str]] = [
    (packed(bytes(8), entry(12)), "binary_data_size 12, but only 8 bytes of the body are left"),
    (packed(bytes(8), entry(8)), r"8 bytes of binary data, shape \[1, 3\] of FP32 needs 12"),
    (packed(bytes(16), entry(12)), "4 bytes are left over after the binary data"),
    (packed(bytes(12), entry(0)), "0 bytes of binary data"),
    (packed(bytes(12), entry(-12)), "is -12, not a non-negative integer"),
    (packed(bytes(12), entry("12")), "is '12', not a non-negative integer"),
    (packed(bytes(12), entry(True)), "is True, not"),
    (packed(bytes(12), entry(1e300)), "is 1e.300, not"),
    (packed(bytes(12), entry(2**62)), "only 12 bytes of the body are left"),
    (packed(bytes(12), entry(12, shape=[2**61, 3])), "needs 27670116110564327424"),
    (packed(bytes(12), entry(12, data=[1, 2, 3])), "both data and binary_data_size"),
    (packed(bytes(12), entry(12, parameters={})), "data is missing"),
    ((packed(bytes(12))[0], 5), "not JSON"),
    ((b'{"inputs":[]}', 14), "is 14, but the body has only 13 bytes"),
    ((b"", 1), "is 1, but the body has only 0 bytes"),
]


@pytest.mark.parametrize(("sent", "message"), BAD)
def test_wrong_lengths_are_refused(sent: tuple[bytes, int], message: str) -> None:
    body, header_length = sent
    codec = v2.InferCodec("m", 1, make_info())
    for _ in range(3):
        with pytest.raises(BadRequest, match=message):
            codec.read(body, header_length)


@pytest.mark.parametrize(("tail", "message"), [(bytes(8), "only 8 bytes"), (bytes(13), "1 bytes are left over")])
def test_lengths_that_become_wrong_later_are_refused(tail: bytes, message: str) -> None:
    codec = v2.InferCodec("m", 1, make_info())
    good, header_length = packed(ROW.tobytes())
    for _ in range(3):
        codec.read(good, header_length)
    with pytest.raises(BadRequest, match=message):
        codec.read(good[:header_length] + tail, header_length)


@pytest.mark.parametrize(
    ("datatype", "data", "message"),
    [
        ("BYTES", bytes(7), "7 bytes of binary data are too few for the 2 elements"),
        ("BYTES", text(b"abcd") + b"\0\0", "ends within the length of element 1"),
        ("BYTES", text(b"a") + b"\xff\xff\xff\xff", "element 1 has a length of 4294967295 bytes, but only 0 bytes"),
        ("BYTES", text(b"a", b"b") + b"c", "1 bytes are left over after the 2 elements"),
        ("BOOL", b"\1\2", "element 1 of BOOL is the byte 2"),
        ("FP16", bytes(3), r"3 bytes of binary data, shape \[1, 2\] of FP16 needs 4"),
        ("BF16", bytes(5), r"5 bytes of binary data, shape \[1, 2\] of BF16 needs 4"),
    ],
)
def test_data_that_is_not_its_datatype_is_refused(datatype: str, data: bytes, message: str) -> None:
    described = entry(len(data), datatype=datatype, shape=[1, 2])
    body, header_length = packed(data, described)
    with pytest.raises(BadRequest, match=message):
        read_infer(body, signature(datatype, (-1, 2)), header_length)


@pytest.mark.parametrize("value", [b"-1", b"+1", b"1.5", b"", b"ten", b" 1", b"0x10", b"1" * 19, b"\xb2"])
def test_a_header_length_that_is_not_a_length_is_refused(value: bytes) -> None:
    with pytest.raises(BadRequest, match="inference-header-content-length .* is not a non-negative integer"):
        read_header_length(value)


def test_a_header_length_is_read() -> None:
    assert [read_header_length(value) for value in (b"0", b"007", b"123")] == [0, 7, 123]


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_values_without_a_json_form_are_returned_in_binary_or_refused(datatype: str) -> None:
    kind = signature(datatype, (-1, 2))
    described = entry(4, datatype=datatype, shape=[1, 2])
    body, header_length = packed(bytes(4), described)
    with pytest.raises(BadRequest, match=f"output 'y' is {datatype}, which has no JSON form"):
        read_infer(body, kind, header_length)
    body, header_length = packed(bytes(4), described, parameters={"binary_data_output": True})
    assert read_infer(body, kind, header_length).outputs == (WantedOutput("y", is_binary=True),)
