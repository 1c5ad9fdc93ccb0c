"""Values as users have them, over HTTP and gRPC: booleans, nulls, image files and texts; decoded as in training."""

import base64
import io
import json
from collections.abc import Callable, Iterator
from hashlib import sha256
from typing import Any

import numpy as np
import onnx
import pytest
import requests
from onnx import TensorProto, helper
from PIL import Image

from maas_ray.bundle.format import Signature, TensorSpec, save_bundle
from maas_ray.client import Client
from maas_ray.data.spec.text import TokenizerSpec
from maas_ray.data.text.tokenizer import learn_tokenizer
from maas_ray.decoding.pixels import decode_image
from maas_ray.decoding.spec import ImageEncoding, TextEncoding
from maas_ray.errors import BadRequest
from maas_ray.store.objects import ObstoreStore, open_store
from tests.serve.conftest import Server, app_spec, publish, serve_app
from tests.support.onnx_models import make_graph, make_info, value

TOKENIZER = learn_tokenizer(
    TokenizerSpec(kind="byte_bpe", vocab_size=300), ["the cat sat on the mat"] * 50, ["<|pad|>"]
)
PAD = TOKENIZER.token_id("<|pad|>", "pad")
TEXT = TextEncoding(length=6, pad=PAD, tokenizer=sha256(TOKENIZER.content).hexdigest())
SHAPE = (3, 4, 5)


def _same(name: str, kind: int, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Returns its inputs unchanged, as int64."""
    return make_graph(
        [helper.make_node("Cast", [name], ["y"], to=TensorProto.INT64)],
        [value(name, kind, ["n", *shape])],
        [value("y", TensorProto.INT64, ["n", *shape])],
    )


def _out(*shape: int) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name="y", datatype="INT64", shape=(-1, *shape)),)


def _publish(store: ObstoreStore) -> None:
    image = TensorSpec(name="image", datatype="UINT8", shape=(-1, *SHAPE), encoding=ImageEncoding(background=7))
    text = TensorSpec(name="text", datatype="INT64", shape=(-1, 6), encoding=TEXT)
    table = (
        TensorSpec(name="flag", datatype="FP32", shape=(-1, 1), boolean=True, nullable=True),
        TensorSpec(name="level", datatype="INT64", shape=(-1, 1), nullable=True, null_value=30),
    )
    graphs = {
        "images": (_same("image", TensorProto.UINT8, SHAPE), Signature(inputs=(image,), outputs=_out(*SHAPE)), None),
        "texts": (_same("text", TensorProto.INT64, (6,)), Signature(inputs=(text,), outputs=_out(6)), TOKENIZER.content),
        "table": (
            make_graph(
                [
                    helper.make_node("IsNaN", ["flag"], ["missing"]),
                    helper.make_node("Where", ["missing", "two", "flag"], ["known"]),
                    helper.make_node("Cast", ["known"], ["number"], to=TensorProto.INT64),
                    helper.make_node("Add", ["number", "level"], ["y"]),
                ],
                [value("flag", TensorProto.FLOAT, ["n", 1]), value("level", TensorProto.INT64, ["n", 1])],
                [value("y", TensorProto.INT64, ["n", 1])],
                {"two": np.float32([2])},
            ),
            Signature(inputs=table, outputs=_out(1)),
            None,
        ),
    }  # fmt: skip
    for name, (graph, signature, tokenizer) in graphs.items():
        bundle = save_bundle(store, make_info(signature), graph.SerializeToString(), tokenizer=tokenizer)
        publish(store, name, bundle)


@pytest.fixture(scope="module")
def raw_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    store = open_store(f"file://{tmp_path_factory.mktemp('raw')}/store")
    _publish(store)
    spec = app_spec(store, "images", "texts", "table", limits={"max_body_bytes": 60_000, "timeout_s": 60})
    yield from serve_app(store, spec, "protocol")


def _infer(server: Server, model: str, *inputs: dict[str, Any]) -> Any:
    answer = requests.post(f"{server.url}/v2/models/{model}/infer", json={"inputs": list(inputs)}, timeout=60)
    return answer.json()["outputs"][0]["data"] if answer.ok else answer.json()["error"]


def _picture(size: tuple[int, int] = (9, 7), seed: int = 0, form: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 4)).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image if form == "PNG" else image.convert("RGB")).save(file, form, exif=exif)
    return file.getvalue()


def _black_bmp() -> bytes:
    """Ends with zeros, which an array of fixed-size bytes would lose."""
    file = io.BytesIO()
    Image.new("L", (4, 2)).save(file, "BMP")
    return file.getvalue()


def test_image_files_are_decoded_as_in_training_beside_plain_pixels(raw_server: Server) -> None:
    files = [_picture(), _picture((4, 4), 1, "JPEG"), _picture((30, 2), 2), _black_bmp()]
    pixels = np.stack([decode_image(file, SHAPE, 7) for file in files])
    with Client(raw_server.url, timeout_s=60) as client:
        (tensor,) = client.inputs("images")
        assert (tensor.datatype, tensor.accepts, tensor.encoding) == ("UINT8", ("BYTES",), "image")
        for sent in (pixels, [{"image": file} for file in files], {"image": files}, {"image": pixels}):
            assert np.array_equal(client.predict("images", sent).outputs["y"], pixels)
    texts = [base64.b64encode(file).decode() for file in files]
    for shape in ([4], [4, 1]):
        found = _infer(raw_server, "images", {"name": "image", "datatype": "BYTES", "shape": shape, "data": texts})
        assert found == pixels.ravel().tolist()
    url = f"{raw_server.url}/v2/models/images/infer"
    raw = requests.post(url, data=files[0], headers={"Inference-Header-Content-Length": "0"}, timeout=60)
    assert np.array_equal(np.frombuffer(raw.content[-pixels[0].nbytes * 8 :], np.int64), pixels[0].ravel())
    generated = requests.post(f"{raw_server.url}/v2/models/images/generate", json={"image": texts[1]}, timeout=60)
    assert generated.json()["y"] == pixels[1].ravel().tolist()


def test_texts_are_tokenized_in_the_replica_beside_token_ids(raw_server: Server) -> None:
    texts = ["the cat", "on the mat, on the mat, on the mat", "größe"]
    ids = np.full((3, 6), PAD)
    for row, found in zip(ids, TOKENIZER.encode(texts), strict=True):
        row[: len(found)] = found[:6]
    with Client(raw_server.url, timeout_s=60) as client:
        for sent in ([{"text": text} for text in texts], {"text": texts}, {"text": ids}, ids):
            assert np.array_equal(client.predict("texts", sent).outputs["y"], ids)
    entry = {"name": "text", "datatype": "BYTES", "shape": [3], "data": texts}
    assert _infer(raw_server, "texts", entry) == ids.ravel().tolist()
    generated = requests.post(f"{raw_server.url}/v2/models/texts/generate", json={"text": texts[0]}, timeout=60)
    assert generated.json()["y"] == ids[0].tolist()


@pytest.mark.parametrize(
    ("datatype", "flags", "expected"),
    [
        ("BOOL", [True, False, None], [31, 30, 32]),
        ("BOOL", [1, 0, 1.0], [31, 30, 31]),
        ("FP32", [True, None, 0], [31, 32, 30]),
        ("FP32", [1.0, 0.0, None], [31, 30, 32]),
        ("BOOL", [True, 2, None], "input 'flag' is BOOL: element 1 is 2, not true, false or null"),
        ("BOOL", [True, "no", False], "input 'flag' is BOOL: element 1 is 'no', not true"),
        ("INT64", [1, 0, 1], "input 'flag': datatype 'INT64' is not the model's FP32 or BOOL"),
    ],
)
def test_booleans_and_nulls_are_those_of_training(
    raw_server: Server, datatype: str, flags: list[Any], expected: Any
) -> None:
    flag = {"name": "flag", "datatype": datatype, "shape": [3, 1], "data": flags}
    level = {"name": "level", "datatype": "INT64", "shape": [3, 1], "data": [None, 30, None]}
    for _ in range(3):  # a repeated request is parsed by its plan
        assert str(_infer(raw_server, "table", flag, level)).startswith(str(expected))
    many = [
        flag | {"shape": [3000, 1], "data": flags * 1000},
        level | {"shape": [3000, 1], "data": [None, 30, None] * 1000},
    ]
    found = _infer(raw_server, "table", *many)
    if isinstance(expected, list):
        assert found == expected * 1000
    else:
        assert isinstance(found, str)


def test_the_client_sends_booleans_and_missing_values(raw_server: Server) -> None:
    rows = [{"flag": True, "level": 1}, {"flag": None, "level": None}, {"flag": False, "level": 5}]
    with Client(raw_server.url, timeout_s=60) as client:
        assert [(one.datatype, one.nullable) for one in client.inputs("table")] == [("BOOL", True), ("INT64", True)]
        assert client.predict("table", rows).outputs["y"].ravel().tolist() == [2, 32, 5]
        assert client.predict("table", rows[::2]).outputs["y"].ravel().tolist() == [2, 5]
        nan = {"flag": np.array([1, np.nan]), "level": np.array([np.nan, 4])}
        assert client.predict("table", nan).outputs["y"].ravel().tolist() == [31, 6]


@pytest.mark.parametrize(
    ("model", "name", "element", "message"),
    [
        ("images", "image", b"# no image", "row 1: cannot be decoded: it is none of PNG, JPEG"),
        ("images", "image", _picture()[:90], "row 1: cannot be decoded"),
        ("images", "image", b"", "row 1: cannot be decoded: it is empty"),
        ("images", "image", b"abc", "row 1: is neither an image file nor one in Base64"),
        ("texts", "text", b"\xff\xfe", "row 1: cannot be decoded: it is not text in UTF-8"),
        ("texts", "text", "", "row 1: cannot be decoded: it is empty"),
    ],
)
def test_an_element_that_cannot_be_decoded_is_refused_by_its_row(
    raw_server: Server, model: str, name: str, element: Any, message: str
) -> None:
    good = _picture() if model == "images" else "the cat"
    with Client(raw_server.url, timeout_s=60) as client:
        with pytest.raises(BadRequest, match=f"input '{name}', {message}"):
            client.predict(model, [{name: good}, {name: element}])
        client.predict(model, [{name: good}])


def test_many_small_files_of_large_pictures_are_refused_before_they_are_decoded(raw_server: Server) -> None:
    file = io.BytesIO()
    Image.new("1", (1, 1)).save(file, "PNG")
    with (
        Client(raw_server.url, timeout_s=60) as client,
        pytest.raises(BadRequest, match="has 1001 encoded rows, which take 60060 bytes .* the limit is 1000 rows"),
    ):
        client.predict("images", {"image": [file.getvalue()[:40]] * 1001})


@pytest.mark.parametrize("is_raw", [True, False], ids=["raw", "typed"])
def test_grpc_takes_the_same_values(raw_server: Server, is_raw: bool) -> None:
    from maas_ray.serve.grpc import inference_pb2 as pb
    from maas_ray.serve.grpc.inference.codec import MessageCodec
    from maas_ray.serve.grpc.inference.message import ModelInfer

    def infer(model: str, fill: Callable[[Any], None]) -> Any:
        request = pb.ModelInferRequest(model_name=model)
        fill(request)
        loaded = raw_server.manager.find(model)
        assert loaded is not None
        read = MessageCodec(model, 1, loaded.info).read_message(ModelInfer(request.SerializeToString()))
        for name in read.encoded:
            assert loaded.decoder is not None
            read.inputs[name] = loaded.decoder.decode(read.inputs[name], 60)
        return read.inputs

    def files(request: Any) -> None:
        tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
        if is_raw:
            request.raw_input_contents.append(len(_picture()).to_bytes(4, "little") + _picture())
        else:
            tensor.contents.bytes_contents.append(_picture())

    def flags(request: Any) -> None:
        flag = request.inputs.add(name="flag", datatype="BOOL", shape=[2, 1])
        level = request.inputs.add(name="level", datatype="INT64", shape=[2, 1])
        if is_raw:
            request.raw_input_contents.extend([b"\1\0", np.int64([1, 2]).tobytes()])
        else:
            flag.contents.bool_contents.extend([True, False])
            level.contents.int64_contents.extend([1, 2])

    with Client(raw_server.url) as client:
        client.predict("images", [{"image": _picture()}])  # both are in memory
        client.predict("table", [{"flag": True, "level": 1}])
    assert np.array_equal(infer("images", files)["image"][0], decode_image(_picture(), SHAPE, 7))
    found = infer("table", flags)
    assert found["flag"].dtype == np.float32
    assert found["flag"].ravel().tolist() == [1, 0]


def test_the_metadata_name_what_an_input_accepts(raw_server: Server) -> None:
    inputs = requests.get(f"{raw_server.url}/v2/models/table", timeout=60).json()["inputs"]
    assert json.dumps(inputs) == json.dumps(
        [
            {
                "name": "flag",
                "datatype": "BOOL",
                "shape": [-1, 1],
                "parameters": {"nullable": True, "accepts": ["FP32"]},
            },
            {
                "name": "level",
                "datatype": "INT64",
                "shape": [-1, 1],
                "parameters": {"nullable": True, "null_value": 30},
            },
        ]
    )
