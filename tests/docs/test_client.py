"""The client in the documentation gets an answer from a replica."""

from pathlib import Path

import pytest
from onnx import TensorProto, helper

from maas_ray.bundle.format import Signature, TensorSpec
from maas_ray.store.objects import open_store
from tests.serve.conftest import app_spec, publish, serve_app
from tests.support.onnx_models import commit_bundle, make_graph, value
from tests.support.pages import DOCS, blocks

IMAGES = Signature(
    inputs=(TensorSpec(name="image", datatype="FP32", shape=(-1, 1, 8, 8)),),
    outputs=(TensorSpec(name="class", datatype="INT64", shape=(-1,)),),
)


def _classifier() -> bytes:
    """The position of the brightest pixel."""
    flat = helper.make_node("Flatten", ["image"], ["flat"], axis=1)
    best = helper.make_node("ArgMax", ["flat"], ["class"], axis=1, keepdims=0)
    image = value("image", TensorProto.FLOAT, ["n", 1, 8, 8])
    return make_graph([flat, best], [image], [value("class", TensorProto.INT64, ["n"])]).SerializeToString()


@pytest.mark.parametrize("block", blocks((DOCS / "serving.md").read_text(), "python"))
def test_the_client_of_the_serving_page_gets_a_response(
    block: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(f"file://{tmp_path}/store")
    publish(store, "digits", commit_bundle(store, _classifier(), IMAGES))
    for server in serve_app(store, app_spec(store, "digits"), "protocol"):
        exec(block.replace("127.0.0.1:8000", f"127.0.0.1:{server.port}"), {})
    assert "'model_name': 'digits'" in capsys.readouterr().out
