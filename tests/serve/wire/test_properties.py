"""Properties for any tensor and any bytes: third-party clients read back the values they sent, and all parsing paths
agree with the plain one in every value and every error text."""

import json
from typing import Any

import hypothesis.extra.numpy as hnp
import ml_dtypes
import numpy as np
import pytest
import tritonclient.http as triton
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maas_ray.bundle.datatypes import NUMPY
from maas_ray.bundle.format import Signature
from maas_ray.errors import BadRequest
from maas_ray.serve.wire import v2
from maas_ray.serve.wire.checks import InferRequest
from maas_ray.serve.wire.request import RequestReader
from tests.support.infer_bodies import read_infer
from tests.support.onnx_models import make_info

# The same examples in every run, and none kept in a directory.
# float16 has so few values that the arrays' own rejection of repeated draws can look like too much filtering.
unfiltered = [HealthCheck.filter_too_much]
few = settings(max_examples=15, derandomize=True, database=None, deadline=None, suppress_health_check=unfiltered)
many = settings(few, max_examples=120)

Client = triton.InferenceServerClient
BINARY_ONLY = ("FP16", "BF16")
BF16 = np.dtype(ml_dtypes.bfloat16)


def signature(datatype: str, rank: int = 2) -> Signature:
    tensor = {"datatype": datatype, "shape": (-1,) * rank}
    return Signature.model_validate({"inputs": [{"name": "x", **tensor}], "outputs": [{"name": "y", **tensor}]})


@st.composite
def tensors(draw: Any, datatype: str, is_finite: bool) -> Any:
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=3, max_side=4))
    if datatype == "BYTES":
        return draw(hnp.arrays(object, shape, elements=st.text(max_size=5), fill=st.nothing()))
    if datatype == "BF16":
        return draw(hnp.arrays(np.uint16, shape)).view(BF16)
    finite = {"allow_nan": False, "allow_infinity": False} if is_finite and NUMPY[datatype].kind == "f" else {}
    return draw(hnp.arrays(NUMPY[datatype], shape, elements=hnp.from_dtype(NUMPY[datatype], **finite)))


def bits(array: Any) -> Any:
    """Comparable, NaN included."""
    return array.tolist() if array.dtype == object else (str(array.dtype), array.shape, array.tobytes())


@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
@pytest.mark.parametrize("datatype", NUMPY)
def test_tritons_client_gets_the_values_it_sent(datatype: str, is_binary: bool) -> None:
    if datatype in BINARY_ONLY and not is_binary:
        pytest.skip("has no JSON form")

    @few
    @given(data=st.data(), request_id=st.text(max_size=3), answers_binary=st.booleans())
    def check(data: Any, request_id: str, answers_binary: bool) -> None:
        sent = data.draw(tensors(datatype, is_finite=not is_binary))
        answers_binary |= datatype in BINARY_ONLY
        given_input = triton.InferInput("x", list(sent.shape), datatype).set_data_from_numpy(sent, is_binary)
        wanted = [triton.InferRequestedOutput("y", binary_data=answers_binary)]
        body, length = Client.generate_request_body([given_input], outputs=wanted, request_id=request_id)
        codec = v2.InferCodec("m", 1, make_info(signature(datatype, sent.ndim)))
        for _ in range(3):  # first, repeated, and cached
            read = codec.read(body, length)
            inner = sent.view(np.uint16) if datatype == "BF16" else sent
            assert bits(read.inputs["x"]) == bits(inner)
            assert (read.id or "", read.num_rows) == (request_id, sent.shape[0])
        answer = codec.write(read, {"y": read.inputs["x"]})
        result = Client.parse_response_body(answer.body, header_length=answer.header_length)
        assert result.get_response().get("id", "") == request_id
        received = result.as_numpy("y")
        if datatype == "BYTES":
            received = np.vectorize(lambda e: e.decode() if isinstance(e, bytes) else e, [object])(received)
        elif not answers_binary and sent.dtype.kind == "f":
            sent = np.where(np.isfinite(sent), sent, np.nan).astype(sent.dtype)  # null
            received = np.where(np.isnan(received), np.nan, received).astype(sent.dtype)
        assert bits(received) == bits(sent)

    check()


def outcome(read: Any) -> Any:
    """Outcome of a request, in a comparable form."""
    try:
        request: InferRequest = read()
    except BadRequest as error:
        return str(error)
    arrays = {name: bits(array) for name, array in request.inputs.items()}
    return arrays, request.id, request.outputs, request.num_rows, request.timeout_us, request.priority


def plain(body: bytes, kind: Signature, header_length: int | None = None) -> Any:
    """Parses with a reader without fast paths."""
    reader = RequestReader(kind, is_fast=False)
    return outcome(lambda: reader.read(body, header_length))


NUMBERS = st.one_of(
    st.integers(-300, 300).map(str),
    st.integers().map(str),
    st.floats(allow_nan=False, allow_infinity=False).map(repr),
    st.sampled_from(
        ["-0", "-0.0", "1E5", "1e400", "-1e-400", "9007199254740993", "16777217", "9223372036854775808", "2.0", "1e39",
         "18446744073709551615", "18446744073709551616", "-9223372036854775809", "3.4028235677973366e38", "01", "1."]
    ),
)  # fmt: skip
ODD = st.sampled_from(["true", "false", "null", '"1"', '"]"', '"["', "[]", "[1]", "{}", '{"a":[1]}', "NaN", "-", ""])
LISTS = st.recursive(
    NUMBERS | NUMBERS | NUMBERS | ODD, lambda inner: st.lists(inner, max_size=3).map(lambda e: f"[{','.join(e)}]")
)
DATA = st.one_of(
    st.lists(NUMBERS, min_size=4, max_size=4).map(lambda e: f"[{','.join(e)}]"),
    st.lists(NUMBERS, min_size=4, max_size=4).map(lambda e: f"[[{e[0]},{e[1]}],[{e[2]} ,{e[3]}]]"),
    st.lists(LISTS, max_size=5).map(lambda e: f"[{','.join(e)}]"),
    LISTS,
)


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT64", "UINT64", "INT32", "UINT8", "INT8"])
def test_every_way_through_the_reader_gives_the_same_numbers_and_the_same_errors(datatype: str) -> None:
    kind = signature(datatype)
    known = v2.InferCodec("m", 1, make_info(kind))
    head = f'{{"inputs":[{{"name":"x","shape":[2,2],"datatype":"{datatype}","data":'
    for _ in range(3):
        known.read(f"{head}[1,2,3,4]}}]}}".encode())
    assert len(known.reader.plans) == 1, "the text is cached"

    @settings(many, max_examples=60)
    @given(data=DATA)
    def check(data: str) -> None:
        small = f"{head}{data}}}]}}".encode()
        large = f"{head}{data}}}]{' ' * 2100}}}".encode()
        expected = plain(small, kind)
        assert outcome(lambda: known.read(small)) == expected
        assert outcome(lambda: read_infer(small, kind)) == expected
        assert outcome(lambda: read_infer(large, kind)) == plain(large, kind)

    check()


SNIPPETS = [b'"', b"[", b"]", b"{", b"}", b",", b":", b" ", b"\\", b"1", b"-", b"e", b"\xff", b"\0", b'"id":"a",', b'"data":[9],', b"null"]  # fmt: skip
CHANGES = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 3), st.sampled_from([b"", *SNIPPETS])), max_size=3
)


def changed(body: bytes, changes: list[tuple[float, int, bytes]]) -> bytes:
    for place, num_removed, inserted in changes:
        at = int(place * len(body))
        body = body[:at] + inserted + body[at + num_removed :]
    return body


def bodies(first_id: bool, rows: int) -> dict[str, Any]:
    request = {"inputs": [{"name": "x", "shape": [rows, 2], "datatype": "FP32"}], "parameters": {"timeout": 5}}
    return {"id": "a-1", **request} if first_id else {**request, "id": "a-1"}


@pytest.mark.parametrize("first_id", [True, False], ids=["id first", "id last"])
@pytest.mark.parametrize("is_binary", [True, False], ids=["binary", "json"])
def test_a_request_like_a_known_one_is_read_as_if_nothing_was_known(first_id: bool, is_binary: bool) -> None:
    kind = signature("FP32")
    known = v2.InferCodec("m", 1, make_info(kind))
    request = bodies(first_id, 1)
    if is_binary:
        request["inputs"][0]["parameters"] = {"binary_data_size": 8}
        text = json.dumps(request).encode()
        body, length = text + np.float32([1, 2]).tobytes(), len(text)
    else:
        request["inputs"][0]["data"] = [1, 2]
        body, length = json.dumps(request).encode(), None
    for _ in range(3):
        known.read(body, length)

    @many
    @given(changes=CHANGES, moved=st.integers(-2, 2))
    def check(changes: list[tuple[float, int, bytes]], moved: int) -> None:
        sent = changed(body, changes)
        shift = None if length is None else max(0, length + len(sent) - len(body) + (moved if not changes else 0))
        assert outcome(lambda: known.read(sent, shift)) == plain(sent, kind, shift)

    check()


def test_the_comparison_catches_a_plan_that_does_not_fit() -> None:
    kind = signature("FP32")
    known = v2.InferCodec("m", 1, make_info(kind))
    body = json.dumps({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}).encode()
    right = RequestReader(kind, is_fast=False).read(body)
    wrong = InferRequest(None, {"x": right.inputs["x"].reshape(2, 1)}, right.outputs, right.num_rows)
    for _ in range(2):
        known.reader.plans.learn_json(body, wrong)
    assert outcome(lambda: known.read(body)) != plain(body, kind)


@many
@given(body=st.binary(max_size=40) | CHANGES.map(lambda c: changed(b'{"inputs":[{"name":"x"}]}', c)), length=st.none() | st.integers(0, 40))  # fmt: skip
def test_any_bytes_at_all_are_read_or_refused(body: bytes, length: int | None) -> None:
    for datatype in ("FP32", "BYTES"):
        outcome(lambda kind=signature(datatype): read_infer(body, kind, length))
