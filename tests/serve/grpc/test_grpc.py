"""The v2 protocol over gRPC: messages and tensors; the service on a real gRPC server, called by Triton's own client."""

import asyncio
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
import pytest
import uvloop
from google.protobuf.descriptor import Descriptor
from tritonclient import grpc as triton
from tritonclient.grpc import model_config_pb2, service_pb2
from tritonclient.utils import InferenceServerException

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.format import Datatype, TensorSpec
from maas_ray.errors import BadRequest, DeadlineExceeded, MaasError, NotOffered, Overloaded, RequestError, SpecError
from maas_ray.serve.grpc import inference_pb2 as pb
from maas_ray.serve.grpc.codec import SPLIT_BYTES, MessageCodec, ModelInfer, as_stream_response
from maas_ray.serve.grpc.entry import SERVICE, STREAM, UNARY
from maas_ray.serve.grpc.methods import GrpcMethods
from maas_ray.serve.grpc.server import Rpcs
from maas_ray.serve.grpc.service import MAX_PIPELINED, QUESTIONS, Caller, Service
from maas_ray.serve.grpc.status import MAX_MESSAGE_BYTES, status_of
from maas_ray.serve.http.handler import Handler
from maas_ray.serve.models.manager import ModelManager
from maas_ray.serve.request.unsupported_extensions import RPCS
from maas_ray.serve.spec.pools import GrpcSpec, ServeSpec
from maas_ray.spec import parse_spec
from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, publish
from tests.support.bundles import toy_info
from tests.support.onnx_models import LOOKUP, MIXED, commit_bundle, linear, lookup, mixed
from tests.support.residents import resident

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
FIELDS = {
    "BOOL": "bool_contents", "INT8": "int_contents", "INT16": "int_contents", "INT32": "int_contents",
    "INT64": "int64_contents", "UINT8": "uint_contents", "UINT16": "uint_contents", "UINT32": "uint_contents",
    "UINT64": "uint64_contents", "FP32": "fp32_contents", "FP64": "fp64_contents", "BYTES": "bytes_contents",
}  # fmt: skip
TRITON_NAMES = [name for name in pb.DESCRIPTOR.message_types_by_name if name not in ("Status", "RetryInfo")]


def codec(datatype: Datatype, num_columns: int = -1, labels: tuple[str, ...] | None = None) -> MessageCodec:
    """Description of a model that returns its only input."""
    tensor = TensorSpec(name="x", datatype=datatype, shape=(-1, num_columns))
    signature = {"inputs": (tensor,), "outputs": (tensor.model_copy(update={"name": "y"}),)}
    info = toy_info()
    signature_ = info.signature.model_copy(update=signature)
    return MessageCodec("m", 3, info.model_copy(update={"signature": signature_, "labels": labels}))


def raw_of(array: Array) -> bytes:
    if array.dtype != object:
        return array.tobytes()
    return b"".join(len(text.encode()).to_bytes(4, "little") + text.encode() for text in array.ravel())


def message(datatype: str, array: Array, *, is_raw: bool, **more: Any) -> Any:
    request = pb.ModelInferRequest(model_name="m", **more)
    tensor = request.inputs.add(name="x", datatype=datatype, shape=array.shape)
    if is_raw:
        request.raw_input_contents.append(raw_of(array))
    else:
        values = array.ravel().tolist()
        field = getattr(tensor.contents, FIELDS[datatype])
        field.extend([value.encode() for value in values] if datatype == "BYTES" else values)
    return request


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


def changed(**what: Any) -> Any:
    """A good request of one FP32 row, with one thing changed."""
    request = message("FP32", np.ones((1, 3), np.float32), is_raw=what.pop("is_raw", True))
    tensor = request.inputs[0]
    for name, value in what.items():
        match name:
            case "shape":
                tensor.ClearField("shape")
                tensor.shape.extend(value)
            case "raw":
                request.ClearField("raw_input_contents")
                request.raw_input_contents.extend(value)
            case "contents":
                tensor.contents.MergeFrom(value)
            case "outputs":
                request.outputs.extend([pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in value])
            case "parameters":
                for key, parameter in value.items():
                    request.parameters[key].MergeFrom(parameter)
            case "tensor_parameters":
                for key, parameter in value.items():
                    tensor.parameters[key].MergeFrom(parameter)
            case "id":
                request.id = value
            case _:
                setattr(tensor, name, value)
    return request


Value = pb.InferParameter
Contents = pb.InferTensorContents
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
    tensor = triton.InferInput("x", [1, 3], "BYTES").set_data_from_numpy(np.array([["a", "", "ü€"]], dtype=np.object_))
    request = pb.ModelInferRequest(raw_input_contents=[tensor._get_content()])
    request.inputs.add(name="x", datatype="BYTES", shape=[1, 3])
    np.testing.assert_array_equal(read(request, codec("BYTES")).inputs["x"], array)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadRequest("x"), grpc.StatusCode.INVALID_ARGUMENT),
        (DeadlineExceeded("x"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Overloaded("x"), grpc.StatusCode.UNAVAILABLE),
        (MaasError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_errors_have_the_status_that_grpc_has_for_them(error: MaasError, code: grpc.StatusCode) -> None:
    assert status_of(error).code == code


def test_every_error_has_a_status() -> None:
    kinds: list[type[MaasError]] = [MaasError]
    for kind in kinds:
        kinds.extend(kind.__subclasses__())
    assert len(kinds) > 20
    unknown = {
        kind.__name__
        for kind in kinds
        if kind.http_status < 500 and status_of(kind("x")).code == grpc.StatusCode.INTERNAL
    }
    assert unknown == {"FilesRefused"}
    assert all(status_of(kind("x")).code == grpc.StatusCode.UNAVAILABLE for kind in kinds if kind.http_status == 503)
    assert issubclass(RequestError, MaasError)


def test_a_refusal_for_load_contains_the_retry_time_in_both_forms() -> None:
    metadata = dict(status_of(Overloaded("full", 2.5)).metadata)
    assert metadata["grpc-retry-pushback-ms"] == "2500"
    details = pb.Status.FromString(metadata["grpc-status-details-bin"])
    assert (details.code, details.message) == (14, "full")
    assert details.details[0].type_url == "type.googleapis.com/google.rpc.RetryInfo"
    assert pb.RetryInfo.FromString(details.details[0].value).retry_delay.ToMilliseconds() == 2500


def test_a_long_message_is_cut_between_characters() -> None:
    message = status_of(BadRequest("é" * 5000)).message
    assert len(message.encode()) <= MAX_MESSAGE_BYTES
    assert message == "é" * (len(message) - 3) + "..."


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"grpc": {"port": 8000}}, "http and grpc have the same port 8000"),
        ({"grpc": {"port": 0}}, "greater than or equal to 1"),
        ({"grpc": {}, "profile": "portable", "http": {"tls": {"certificate": "c", "key": "k"}}}, "stay plain text"),
    ],
)
def test_what_grpc_cannot_be_is_refused(more: dict[str, Any], reason: str) -> None:
    described = {"pools": [{"models": [{"name": "m"}]}]}
    assert parse_spec(ServeSpec, described).grpc is None
    assert parse_spec(ServeSpec, {**described, "grpc": {}}).grpc == GrpcSpec(port=9000)
    with pytest.raises(SpecError, match=reason):
        parse_spec(ServeSpec, described | more)


@dataclass
class Server:
    """The service on grpc.aio's server, on a loop in a thread as in a replica."""

    address: str
    manager: ModelManager
    handler: Handler
    call: Callable[[Any], Any]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('grpc')}/store")
    publish(store, "linear", commit_bundle(store, linear(2.0), run="run-a"))
    publish(store, "mixed", commit_bundle(store, mixed(), MIXED, run="run-b"))
    publish(store, "lookup", commit_bundle(store, lookup(), LOOKUP, run="run-c"))
    publish(store, "wide", commit_bundle(store, *wide(), run="run-d"))
    spec = app_spec(store, "linear", "mixed", "lookup", "wide", limits={"timeout_s": 20, "max_body_bytes": 20 << 20})
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    loop = runner.get_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def call(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def start() -> tuple[Any, int, ModelManager, Handler]:
        manager = ModelManager(store, spec)
        await manager.start()
        handler = Handler(manager, spec.limits.max_body_bytes)
        # As Ray Serve starts its own: without a limit worth the name, so ours is the one that counts.
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        server = grpc.aio.server(options=options)
        server.add_generic_rpc_handlers((Rpcs(Service(handler, spec.limits), "pool").handlers(),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port, manager, handler

    running, port, manager, handler = call(start())
    yield Server(f"127.0.0.1:{port}", manager, handler, call)
    call(running.stop(1))
    call(manager.close())
    loop.call_soon_threadsafe(loop.stop)
    thread.join(30)
    runner.close()


def wide() -> tuple[bytes, Any]:
    tensors = [TensorSpec(name=name, datatype="FP32", shape=(-1, 1 << 20)) for name in ("x", "y")]
    signature = toy_info().signature.model_copy(update={"inputs": (tensors[0],), "outputs": (tensors[1],)})
    return linear(2.0, width=1 << 20), signature


@pytest.fixture
def client(server: Server) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(server.address) as client:
        yield client


@pytest.fixture
def channel(server: Server) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(server.address) as channel:
        yield channel


def tensor(array: Array, name: str = "x", datatype: str = "FP32") -> triton.InferInput:
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


ROW = np.array([[1, 2, 3]], np.float32)


def test_tritons_client_infers_with_its_defaults(client: triton.InferenceServerClient) -> None:
    answer = client.infer("linear", [tensor(ROW)], request_id="7", model_version="1", priority=1, timeout=10_000_000)
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * ROW)
    response = answer.get_response()
    assert (response.model_name, response.model_version, response.id) == ("linear", "1", "7")


def test_tritons_client_sends_strings_and_requests_outputs(client: triton.InferenceServerClient) -> None:
    inputs = [
        tensor(np.array([["green"], ["blue"]], dtype=object), "color", "BYTES"),
        tensor(np.array([[np.nan], [5]], np.float32), "age"),
    ]
    answer = client.infer("mixed", inputs, outputs=[triton.InferRequestedOutput("echo"), triton.InferRequestedOutput("shown")])  # fmt: skip
    assert answer.as_numpy("echo").tolist() == [[b"green"], [b"blue"]]
    assert answer.as_numpy("shown").tolist() == [[30.0], [5.0]]
    assert answer.as_numpy("code") is None


def test_tritons_client_requests_classes(client: triton.InferenceServerClient) -> None:
    answer = client.infer("linear", [tensor(ROW)], outputs=[triton.InferRequestedOutput("y", class_count=2)])
    assert answer.as_numpy("y").tolist() == [[b"6.000000:2", b"4.000000:1"]]


def test_tritons_client_infers_asynchronously_and_compressed(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    for _ in range(20):
        client.async_infer("linear", [tensor(ROW)], callback=lambda result, error: answers.put((result, error)))
    for _ in range(20):
        result, error = answers.get(timeout=20)
        assert error is None
        np.testing.assert_array_equal(result.as_numpy("y"), 2 * ROW)
    packed = client.infer("linear", [tensor(ROW)], compression_algorithm="gzip")
    np.testing.assert_array_equal(packed.as_numpy("y"), 2 * ROW)


def test_tritons_client_reads_health_metadata_and_configuration(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("linear")
    assert client.is_model_ready("linear", "1")
    assert not client.is_model_ready("nothing")
    assert not client.is_model_ready("linear", "9")
    assert client.get_server_metadata().name == "maas-ray"
    metadata = client.get_model_metadata("mixed")
    assert (metadata.name, list(metadata.versions), metadata.platform) == ("mixed", ["1"], "onnxruntime_onnx")
    assert [(item.name, item.datatype, list(item.shape)) for item in metadata.inputs] == [
        ("color", "BYTES", [-1, 1]),
        ("age", "FP32", [-1, 1]),
    ]
    config = client.get_model_config("linear").config
    assert (config.name, config.max_batch_size) == ("linear", 64)
    assert [(item.name, item.data_type, list(item.dims)) for item in config.input] == [
        ("x", model_config_pb2.TYPE_FP32, [3])
    ]


def test_statistics_count_grpc_requests(client: triton.InferenceServerClient) -> None:
    def counts() -> tuple[int, int]:
        (found,) = client.get_inference_statistics("lookup").model_stats
        return found.inference_count, found.inference_stats.success.count

    client.infer("lookup", [tensor(np.array([[1], [2]]), "index", "INT64")])
    before = counts()
    client.infer("lookup", [tensor(np.array([[1], [2]]), "index", "INT64")])
    assert counts() == (before[0] + 2, before[1] + 1)
    assert len(client.get_inference_statistics().model_stats) >= 4


def test_the_index_lists_every_model(client: triton.InferenceServerClient) -> None:
    models = client.get_model_repository_index().models
    assert {(model.name, model.version, model.state) for model in models} == {
        (name, "1", "READY") for name in ("linear", "mixed", "lookup", "wide")
    }


def test_the_names_that_serve_is_given_are_those_of_the_service(server: Server) -> None:
    assert set(UNARY) == {"ModelInfer", *QUESTIONS, *RPCS}
    assert all(hasattr(GrpcMethods, name) for name in (*UNARY, STREAM))


def test_loading_reports_why_it_is_not_available(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.load_model("linear", config="{}", files={"file:1/model.onnx": b"x"})
    assert caught.value.status() == "StatusCode.INTERNAL"  # as Triton answers it
    assert "failed to load 'linear', failed to poll from model repository" in caught.value.message()


def test_a_tensor_beyond_grpcs_default_limit_passes_and_one_beyond_the_pools_is_refused(
    client: triton.InferenceServerClient,
) -> None:
    array = np.full((4, 1 << 20), 0.5, np.float32)
    answer = client.infer("wide", [tensor(array)])
    np.testing.assert_array_equal(answer.as_numpy("y"), 2 * array)
    with pytest.raises(InferenceServerException, match="the limit is 20971520") as caught:
        client.infer("wide", [tensor(np.zeros((6, 1 << 20), np.float32))])
    assert caught.value.status() == "StatusCode.RESOURCE_EXHAUSTED"


FAILURES: list[tuple[str, dict[str, Any], str]] = [
    ("NOT_FOUND", {"model_name": "nothing"}, "Request for unknown model: 'nothing' is not found"),
    ("NOT_FOUND", {"model_version": "9"}, "'linear' version 9 is not found"),
    ("INVALID_ARGUMENT", {"model_version": "latest"}, "not a positive integer"),
    ("INVALID_ARGUMENT", {"inputs": [tensor(np.zeros((1, 4), np.float32))]}, "shape [1, 4] does not match"),
    ("UNIMPLEMENTED", {"sequence_id": 5}, "sequences are not supported"),
]


@pytest.mark.parametrize(("code", "change", "reason"), FAILURES, ids=[reason for _, _, reason in FAILURES])
def test_a_refusal_has_its_exact_status_and_its_reason(
    client: triton.InferenceServerClient, code: str, change: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InferenceServerException) as caught:
        client.infer(**{"model_name": "linear", "inputs": [tensor(ROW)], **change})
    assert caught.value.status() == f"StatusCode.{code}"
    assert reason in caught.value.message()


def test_a_request_that_is_late_on_arrival_is_not_run(server: Server) -> None:
    request = changed()
    request.model_name = "linear"

    async def ask(deadline: float) -> Any:
        service = Service(server.handler, server.manager.spec.limits)
        return await service.answer("ModelInfer", request.SerializeToString(), Caller(b"id", deadline))

    assert server.call(ask(math.inf)).body
    with pytest.raises(DeadlineExceeded):
        server.call(ask(0.0))


def test_a_failure_of_the_model_is_an_error_of_that_request_alone(client: triton.InferenceServerClient) -> None:
    good, poison = tensor(np.array([[1]]), "index", "INT64"), tensor(np.array([[99]]), "index", "INT64")

    def ask(kind: triton.InferInput) -> Any:
        try:
            return client.infer("lookup", [kind]).as_numpy("y").tolist()
        except InferenceServerException as error:
            return error.status()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, [good, poison] * 8))
    assert answers[::2] == [[[10.0]]] * 8
    assert len(set(answers[1::2])) == 1
    assert answers[1] != "StatusCode.UNKNOWN"


def call(channel: grpc.Channel, method: str, body: bytes = b"", **more: Any) -> tuple[bytes, Any]:
    response, rpc = channel.unary_unary(f"/{SERVICE}/{method}").with_call(body, timeout=20, **more)
    return response, rpc


def test_answers_carry_request_id_run_and_version(channel: grpc.Channel) -> None:
    request = message("FP32", ROW, is_raw=False, parameters={"binary_data_output": Value(bool_param=False)})
    request.model_name = "linear"
    response, rpc = call(channel, "ModelInfer", request.SerializeToString(), metadata=[("x-request-id", "mine")])
    assert list(pb.ModelInferResponse.FromString(response).outputs[0].contents.fp32_contents) == [2, 4, 6]
    metadata = dict(rpc.trailing_metadata())
    assert metadata == metadata | {"x-request-id": "mine", "x-maas-run": "run-a", "x-maas-version": "1"}


@pytest.mark.parametrize("method", [name for name in UNARY if name not in RPCS])
def test_bytes_without_a_message_are_an_invalid_argument_of_every_method(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method, b"\x0a\xff")
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert f"are not a {method}Request" in caught.value.details()


@pytest.mark.parametrize(
    "method", ["SystemSharedMemoryRegister", "CudaSharedMemoryRegister", "TraceSetting", "LogSettings", "Nonsense"]
)
def test_methods_that_are_not_offered_are_unimplemented(channel: grpc.Channel, method: str) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, method)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_call_to_another_pool_is_refused_with_the_pools_name(channel: grpc.Channel) -> None:
    call(channel, "ServerLive", metadata=[("application", "pool")])
    with pytest.raises(grpc.RpcError) as caught:
        call(channel, "ServerLive", metadata=[("application", "other")])
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def stall(server: Server, seconds: float) -> Any:
    """Keeps the loop of the server busy, so that requests arrive together and deadlines pass."""

    async def sleep() -> None:
        time.sleep(seconds)

    return asyncio.run_coroutine_threadsafe(sleep(), resident(server.manager, "linear").batcher._loop)  # type: ignore[arg-type]


def test_a_stream_is_answered_in_order_with_errors_among_the_answers(client: triton.InferenceServerClient) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    num_requests = 3 * MAX_PIPELINED
    for index in range(num_requests):
        row = tensor(np.full((1, 4 if index % 10 == 3 else 3), index, np.float32))
        client.async_stream_infer("linear", [row], request_id=str(index), enable_empty_final_response=index % 2 == 0)
    for index in range(num_requests):
        result, error = answers.get(timeout=20)
        if index % 10 == 3:
            assert "does not match" in error.message()
            continue
        assert error is None
        response = result.get_response()
        assert response.id == str(index)
        assert response.parameters["triton_final_response"].bool_param == (index % 2 == 0)
        np.testing.assert_array_equal(result.as_numpy("y"), np.full((1, 3), 2 * index, np.float32))
    client.stop_stream()


def test_a_stream_with_statuses_ends_with_the_first_error(channel: grpc.Channel) -> None:
    good = changed()
    good.model_name = "linear"
    bodies = [good.SerializeToString(), b"\x0a\xff", good.SerializeToString()]
    stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(
        iter(bodies), metadata=[("triton_grpc_error", "true")], timeout=20
    )
    assert pb.ModelStreamInferResponse.FromString(next(stream)).infer_response.model_name == "linear"
    with pytest.raises(grpc.RpcError) as caught:
        next(stream)
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def settled(server: Server) -> int:
    """Requests still in progress, once the loop has had time to notice disconnects."""
    for _ in range(200):
        if server.handler.num_ongoing == 0:
            break
        await asyncio.sleep(0.02)
    return server.handler.num_ongoing


def test_disconnects_and_expired_deadlines_leave_nothing_behind(server: Server, channel: grpc.Channel) -> None:
    request = changed()
    request.model_name = "linear"
    body = request.SerializeToString()
    busy = stall(server, 0.4)
    infer = channel.unary_unary(f"/{SERVICE}/ModelInfer")
    left = [infer.future(body, timeout=20) for _ in range(20)]
    late = [infer.future(body, timeout=0.1) for _ in range(20)]
    stream = channel.stream_stream(f"/{SERVICE}/ModelStreamInfer")(iter([body] * 100), timeout=20)
    for future in left:
        future.cancel()
    stream.cancel()
    for future in late:
        with pytest.raises(grpc.RpcError) as caught:
            future.result()
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    busy.result(20)
    assert server.call(settled(server)) == 0
    call(channel, "ModelInfer", body)
