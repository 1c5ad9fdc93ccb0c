"""Messages of inference and tensors: accepted and refused requests, and responses."""

from typing import Any

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import serialize_byte_tensor

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Datatype, TensorSpec
from maas_ray.errors import BadRequest, NotOffered
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.inference.codec import MessageCodec
from maas_ray.serve.grpc.inference.message import SPLIT_BYTES, ModelInfer, as_stream_response
from tests.support.bundles import toy_info
from tests.support.infer_messages import FIELDS, Contents, Value, changed, message, raw_of

RNG = np.random.default_rng(3)
VALUES: dict[Datatype, Array] = {
    "BOOL": np.array([[True, False, True]]),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "UINT8": np.array([[0, 1, 255]], np.uint8),
    "UINT16": np.array([[0, 1, 2**16 - 1]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1]], np.uint64),
    "FP16": np.array([[0.5, -1, 65504]], np.float16),
    "BF16": np.array([[0x3F80, 0xBF80, 0]], np.uint16),
    "FP32": np.array([[0.1, np.nan, -np.inf]], np.float32),
    "FP64": np.array([[0.1, 5e-324, np.inf]], np.float64),
    "BYTES": np.array([["", "é", "x" * 70_000]], dtype=object),
}
TRITON_NAMES = [name for name in pb.DESCRIPTOR.message_types_by_name if name not in ("Status", "RetryInfo")]


def codec(datatype: Datatype, num_columns: int = -1, labels: tuple[str, ...] | None = None) -> MessageCodec:
    """Description of a model that returns its only input."""
    tensor = TensorSpec(name="x", datatype=datatype, shape=(-1, num_columns))
    signature = {"inputs": (tensor,), "outputs": (tensor.model_copy(update={"name": "y"}),)}
    info = toy_info()
    signature_ = info.signature.model_copy(update=signature)
    return MessageCodec("m", 3, info.model_copy(update={"signature": signature_, "labels": labels}))


def read(request: Any, reader: MessageCodec) -> Any:
    return reader.read_message(ModelInfer(request.SerializeToString()))


@pytest.mark.parametrize("name", TRITON_NAMES)
def test_our_messages_have_tritons_field_numbers_and_types(name: str) -> None:
    def described(message: Descriptor, kept: set[str]) -> dict[str, Any]:
        return {
            field.name: (field.number, field.type, field.is_repeated)
            for field in message.fields
            if field.name in kept
        }  # fmt: skip

    def compare(ours: Descriptor, theirs: Descriptor) -> None:
        kept = {field.name for field in ours.fields}
        assert described(ours, kept) == described(theirs, kept)
        for nested in ours.nested_types:
            compare(nested, theirs.nested_types_by_name[nested.name])
        for kind in ours.enum_types:
            assert dict(kind.values_by_name).keys() == dict(theirs.enum_types_by_name[kind.name].values_by_name).keys()

    theirs = {**service_pb2.DESCRIPTOR.message_types_by_name, **model_config_pb2.DESCRIPTOR.message_types_by_name}
    compare(pb.DESCRIPTOR.message_types_by_name[name], theirs[name])


def test_our_enum_of_datatypes_is_tritons() -> None:
    assert pb.DataType.items() == model_config_pb2.DataType.items()


@pytest.mark.parametrize(
    ("datatype", "is_raw"), [*((name, True) for name in VALUES), *((name, False) for name in FIELDS)]
)
def test_every_datatype_and_form_is_written_as_it_was_read(datatype: Datatype, is_raw: bool) -> None:
    array = VALUES[datatype]
    reader = codec(datatype)
    asked = {} if is_raw else {"binary_data_output": Value(bool_param=False)}
    request = read(message(datatype, array, is_raw=is_raw, id="7", parameters=asked), reader)
    np.testing.assert_array_equal(request.inputs["x"], array, strict=True)
    answer = pb.ModelInferResponse.FromString(b"".join(reader.write_message(request, {"y": array})))
    assert (answer.model_name, answer.model_version, answer.id) == ("m", "3", "7")
    (output,) = answer.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("y", datatype, array.shape)
    sent = message(datatype, array, is_raw=is_raw)
    assert list(answer.raw_output_contents) == list(sent.raw_input_contents)
    assert output.contents.SerializeToString() == sent.inputs[0].contents.SerializeToString()


def test_large_tensors_are_read_where_they_were_received_and_not_copied() -> None:
    array = RNG.random((1, SPLIT_BYTES), np.float32)
    # Put where the tensor is aligned; elsewhere it is copied once.
    for padding in range(8):
        received = ModelInfer(message("FP32", array, is_raw=True, id="i" * (padding + 1)).SerializeToString())
        read = codec("FP32").read_message(received)
        np.testing.assert_array_equal(read.inputs["x"], array)
        if not read.inputs["x"].flags.owndata:
            break
    else:
        pytest.fail("every tensor was copied")
    assert not len(received.message.raw_input_contents)


def test_several_large_inputs_come_apart_whatever_the_order_of_the_fields() -> None:
    tensors = tuple(TensorSpec(name=name, datatype="FP32", shape=(-1, -1)) for name in ("a", "b"))
    info = toy_info()
    signature = info.signature.model_copy(update={"inputs": tensors})
    reader = MessageCodec("m", 1, info.model_copy(update={"signature": signature}))
    first, second = RNG.random((2, 5000), np.float32), RNG.random((2, 7), np.float32)
    head = pb.ModelInferRequest(model_name="m", id="late")
    for name, array in (("b", second), ("a", first)):
        head.inputs.add(name=name, datatype="FP32", shape=array.shape)
    raw = pb.ModelInferRequest(raw_input_contents=[second.tobytes(), first.tobytes()])
    request = reader.read_message(ModelInfer(raw.SerializeToString() + head.SerializeToString()))
    assert list(request.inputs) == ["a", "b"]
    np.testing.assert_array_equal(request.inputs["a"], first)
    np.testing.assert_array_equal(request.inputs["b"], second)


BROKEN = [b"\xff" * 20, b"\x08\x01", b"\x3a\xff\xff\xff\xff\x0f" + b"x" * 10, b"\x0b", b"\x0a\x02\xff\xfe"]


@pytest.mark.parametrize("body", BROKEN)
@pytest.mark.parametrize("padding", [b"", b"\x3a\x80\x80\x02" + b"x" * 32768], ids=["small", "large"])
def test_bytes_without_a_request_are_refused_with_the_reason(body: bytes, padding: bytes) -> None:
    with pytest.raises(BadRequest, match=r"not a ModelInferRequest|missing input|0 inputs and 1 raw"):
        codec("FP32").read_message(ModelInfer(padding + body))


@pytest.mark.parametrize("cut", [1, 3, 4, 9, 20, 1000, 17000])
def test_a_large_request_that_is_cut_off_is_refused(cut: int) -> None:
    body = message("FP32", RNG.random((1, 5000), np.float32), is_raw=True).SerializeToString()
    with pytest.raises(BadRequest):
        codec("FP32").read_message(ModelInfer(body[:-cut]))


# fmt: off
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "z"}, "unknown input 'z'"),
    ({"datatype": "FP64"}, "datatype 'FP64' is not the model's FP32"),
    ({"shape": [1]}, "1 dimensions instead of 2"),
    ({"shape": [1, -3]}, "not a list of non-negative integers"),
    ({"shape": [0, 3], "raw": [b""]}, "no rows"),
    ({"shape": [1, 2**40]}, "needs"),
    ({"shape": [2**62, 2**62]}, "needs"),
    ({"shape": [2**62, 2**62], "is_raw": False}, "needs"),
    ({"raw": []}, "fp32_contents has 0 elements"),
    ({"raw": [b"12345"]}, "5 bytes of binary data"),
    ({"raw": [b"1" * 12, b"2" * 12]}, "1 inputs and 2 raw_input_contents"),
    ({"contents": Contents(fp32_contents=[1, 2, 3])}, "both contents and raw_input_contents"),
    ({"is_raw": False, "contents": Contents(fp32_contents=[1])}, "has 4 elements"),
    ({"is_raw": False, "contents": Contents(int_contents=[1])}, "send fp32_contents instead of int_contents"),
    ({"outputs": ["nothing"]}, "unknown output 'nothing'"),
    ({"outputs": ["y", "y"]}, "requested twice"),
    ({"parameters": {"timeout": Value(int64_param=-1)}}, "'timeout'"),
    ({"parameters": {"timeout": Value(string_param="soon")}}, "'timeout'"),
    ({"parameters": {"priority": Value(double_param=0.5)}}, "'priority'"),
    ({"parameters": {"sequence_id": Value(int64_param=5)}}, "sequences are not supported"),
    ({"tensor_parameters": {"shared_memory_region": Value(string_param="r")}}, "shared memory"),
    ({"id": "i" * 300}, "256 characters"),
]
# fmt: on


@pytest.mark.parametrize(("change", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_a_request_that_does_not_fit_is_refused_with_the_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises((BadRequest, NotOffered), match=reason.replace("(", r"\(")):
        read(changed(**change), codec("FP32"))


@pytest.mark.parametrize("datatype", ["FP16", "BF16"])
def test_half_precision_has_no_typed_form_and_its_answers_are_raw(datatype: Datatype) -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype=datatype, shape=[1, 1], contents=Contents(fp32_contents=[1]))
    with pytest.raises(BadRequest, match="send raw_input_contents"):
        read(request, codec(datatype))


def test_the_same_request_unchanged_is_accepted() -> None:
    assert read(changed(), codec("FP32")).num_rows == 1
    assert read(changed(is_raw=False), codec("FP32")).num_rows == 1


@pytest.mark.parametrize(
    ("datatype", "contents"),
    [
        ("INT8", Contents(int_contents=[128])),
        ("INT16", Contents(int_contents=[-32769])),
        ("UINT8", Contents(uint_contents=[256])),
        ("UINT16", Contents(uint_contents=[65536])),
    ],
)
def test_numbers_beyond_their_datatype_are_refused(datatype: Datatype, contents: Any) -> None:
    request = pb.ModelInferRequest()
    request.inputs.add(name="x", datatype=datatype, shape=[1, 1], contents=contents)
    with pytest.raises(BadRequest, match="element 0 is .* out of range"):
        read(request, codec(datatype))


@pytest.mark.parametrize(
    ("whole", "alone", "is_raw"),
    [
        (None, None, True), (True, None, True), (False, None, False), (None, False, False), (False, True, True),
        (True, False, False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_typed", [True, False])
def test_answers_are_raw_whatever_the_request_was_unless_typed_contents_are_asked_for(
    whole: bool | None, alone: bool | None, is_raw: bool, is_typed: bool
) -> None:
    request = message("FP32", np.ones((1, 3), np.float32), is_raw=not is_typed)
    if whole is not None:
        request.parameters["binary_data_output"].bool_param = whole
    if alone is not None:
        request.outputs.add(name="y").parameters["binary_data"].bool_param = alone
    reader = codec("FP32")
    parts = reader.write_message(read(request, reader), {"y": np.ones((1, 3), np.float32)})
    answer = pb.ModelInferResponse.FromString(b"".join(map(bytes, parts)))
    assert bool(answer.raw_output_contents) == is_raw
    assert answer.outputs[0].HasField("contents") != is_raw


@pytest.mark.parametrize("is_raw", [True, False])
def test_bytes_that_are_not_utf8_are_kept(is_raw: bool) -> None:
    request = pb.ModelInferRequest()
    tensor = request.inputs.add(name="x", datatype="BYTES", shape=[1, 1])
    if is_raw:
        request.raw_input_contents.append(b"\1\0\0\0\xff")
    else:
        tensor.contents.bytes_contents.append(b"\xff")
        request.parameters["binary_data_output"].bool_param = False
    reader = codec("BYTES")
    found = read(request, reader)
    assert found.inputs["x"].tolist() == [["\udcff"]]
    answer = pb.ModelInferResponse.FromString(
        b"".join(map(bytes, reader.write_message(found, {"y": found.inputs["x"]})))
    )
    sent = answer.raw_output_contents[0][4:] if is_raw else answer.outputs[0].contents.bytes_contents[0]
    assert sent == b"\xff"


def test_raw_contents_with_empty_typed_ones_are_answered_raw() -> None:
    request = message("FP32", VALUES["FP32"], is_raw=True)
    request.inputs[0].contents.SetInParent()
    assert [output.is_binary for output in read(request, codec("FP32")).outputs] == [True]


@pytest.mark.parametrize("count", [0, 1])
def test_a_request_without_typed_contents_is_answered_raw(count: int) -> None:
    tensor = TensorSpec(name="x", datatype="FP32", shape=(1,))
    signature = toy_info().signature.model_copy(update={"inputs": (tensor,) * count, "outputs": (tensor,)})
    reader = MessageCodec("m", 1, toy_info().model_copy(update={"signature": signature}))
    request = pb.ModelInferRequest(outputs=[pb.ModelInferRequest.InferRequestedOutputTensor(name="x")])
    if count:
        request.inputs.add(name="x", datatype="FP32", shape=[1])
        request.raw_input_contents.append(bytes(4))
    assert [output.is_binary for output in read(request, reader).outputs] == [True]


def test_parameters_and_wanted_classes_reach_the_request() -> None:
    request = changed(parameters={"timeout": Value(int64_param=1500), "priority": Value(uint64_param=2), "mine": Value(double_param=0.5)})  # fmt: skip
    request.outputs.add(name="y").parameters["classification"].int64_param = 2
    reader = codec("FP32", labels=("a", "b", "c"))
    found = read(request, reader)
    assert (found.timeout_us, found.priority) == (1500, 2)
    answer = pb.ModelInferResponse.FromString(
        b"".join(reader.write_message(found, {"y": np.array([[1, 3, 2]], np.float32)}))
    )
    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("BYTES", [1, 2])
    assert answer.raw_output_contents[0] == raw_of(np.array(["3.000000:1:b", "2.000000:2:c"], dtype=object))


def test_an_answer_inside_a_stream_message_is_the_same_answer() -> None:
    reader = codec("FP32")
    array = RNG.random((1, 40_000), np.float32)
    request = read(message("FP32", array, is_raw=True), reader)
    alone = b"".join(reader.write_message(request, {"y": array}))
    streamed = b"".join(as_stream_response(reader.write_message(request, {"y": array})))
    expected = pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse.FromString(alone))
    assert pb.ModelStreamInferResponse.FromString(streamed) == expected


def test_tritons_own_client_encodes_strings_as_we_read_them() -> None:
    array = np.array([["a", "", "ü€"]], dtype=object)
    request = pb.ModelInferRequest(raw_input_contents=[serialize_byte_tensor(array).item()])
    request.inputs.add(name="x", datatype="BYTES", shape=[1, 3])
    np.testing.assert_array_equal(read(request, codec("BYTES")).inputs["x"], array)
