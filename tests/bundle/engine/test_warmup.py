import os
from dataclasses import replace

import numpy as np
import pytest
from onnx import TensorProto as T
from onnx import helper

from maas_ray.bundle.apart import service
from maas_ray.bundle.engine import engine
from maas_ray.bundle.engine.engine import Engine, EngineSpec
from maas_ray.bundle.engine.warmup import guesses
from maas_ray.bundle.format import Bundle, Signature, TensorSpec, load_bundle, save_bundle
from maas_ray.bundle.loading import load_engine
from maas_ray.bundle.sample import from_document, read_sample, write_sample
from maas_ray.errors import BundleError, SpecError
from maas_ray.store.objects import ObjectStore
from tests.support.onnx_models import LINEAR, LOOKUP, MIXED, linear, lookup, make_bundle, make_graph, make_info, value


def tensor(name: str, datatype: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape)  # type: ignore[arg-type]


def number_of_text() -> Bundle:
    """Triton's simple_string in short: a text that must read as a number."""
    graph = make_graph(
        [helper.make_node("Cast", ["x"], ["y"], to=T.INT32)],
        [value("x", T.STRING, ["n", 2])],
        [value("y", T.INT32, ["n", 2])],
    )
    signature = Signature(inputs=(tensor("x", "BYTES", (-1, 2)),), outputs=(tensor("y", "INT32", (-1, 2)),))
    return make_bundle(graph.SerializeToString(), signature)


def image_of_free_size() -> Bundle:
    graph = make_graph(
        [helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[5, 5])],
        [value("x", T.FLOAT, ["n", 3, "h", "w"])],
        [value("y", T.FLOAT, ["n", 3, "h2", "w2"])],
    )
    return make_bundle(
        graph.SerializeToString(),
        Signature(inputs=(tensor("x", "FP32", (-1, 3, -1, -1)),), outputs=(tensor("y", "FP32", (-1, 3, -1, -1)),)),
    )


def quotient() -> Bundle:
    graph = make_graph(
        [helper.make_node("Div", ["a", "b"], ["y"])],
        [value("a", T.INT32, [2]), value("b", T.INT32, [2])],
        [value("y", T.INT32, [2])],
    )
    inputs = (tensor("a", "INT32", (2,)), tensor("b", "INT32", (2,)))
    return make_bundle(graph.SerializeToString(), Signature(inputs=inputs, outputs=(tensor("y", "INT32", (2,)),)))


@pytest.mark.parametrize(
    ("bundle", "values"),
    [
        (make_bundle(), "zeros"),
        (number_of_text(), "ones"),
        (image_of_free_size(), "zeros, free sizes 8"),
    ],
    ids=["numbers", "texts that read as numbers", "images of free size"],
)
def test_the_first_values_that_the_graph_takes_warm_it_up(bundle: Bundle, values: str) -> None:
    assert Engine(bundle).warmed_with == values


def test_stages_are_printed_in_order_and_values_can_be_omitted() -> None:
    told: list[str] = []
    engine = Engine(quotient(), skip=("zeros",), on_stage=told.append)
    assert told == ["session", "ones"]
    assert engine.warmed_with == "ones"


def test_every_guess_is_of_the_datatypes_and_shapes_of_the_signature() -> None:
    kinds = "BOOL UINT8 UINT16 UINT32 UINT64 INT8 INT16 INT32 INT64 FP16 BF16 FP32 FP64 BYTES".split()  # noqa: SIM905
    inputs = tuple(tensor(kind, kind, (-1, 3, -1)) for kind in kinds)
    signature = Signature(inputs=inputs, outputs=(tensor("y", "FP32", (-1, 1)),))
    found = list(guesses(signature))
    assert len(found) == 12
    for guess in found:
        given = guess.values(4)
        assert {array.shape[:2] for array in given.values()} == {(4, 3)}
        assert read_sample(write_sample(given, signature), signature).keys() == given.keys()


def test_recorded_values_are_kept_with_the_bundle_and_used_first(file_store: ObjectStore) -> None:
    sample = write_sample({"index": np.array([[4]])}, LOOKUP)
    plain = save_bundle(file_store, make_info(LOOKUP), lookup())
    first = save_bundle(file_store, make_info(LOOKUP), lookup(), sample)
    again = save_bundle(file_store, make_info(LOOKUP), lookup(), sample)
    assert first == again != plain
    bundle = load_bundle(file_store, first)
    assert bundle.sample == sample
    assert Engine(bundle, EngineSpec(warmup_rows=(1, 8))).warmed_with == "recorded values"
    assert load_bundle(file_store, plain).sample is None


def test_recorded_values_that_the_graph_refuses_are_a_defect() -> None:
    sample = write_sample({"index": np.array([[99]])}, LOOKUP)
    with pytest.raises(BundleError, match="its recorded values"):
        Engine(replace(make_bundle(lookup(), LOOKUP), sample=sample))


def test_samples_survive_being_written() -> None:
    values = {"color": np.array([["rot"], ["grün"]], dtype=object), "age": np.float32([[np.nan], [2.5]])}
    found = read_sample(write_sample(values, MIXED), MIXED)
    assert found["color"].tolist() == [["rot"], ["grün"]]
    np.testing.assert_array_equal(found["age"], values["age"])


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ([], "does not contain the input 'x'"),
        ([{"name": "z", "shape": [1], "data": [1]}], "has the input 'z'"),
        ([{"name": "x", "shape": [1, 4], "data": [1, 2, 3, 4]}], "has the shape"),
        ([{"name": "x", "shape": [1, 3], "data": [1, 2]}], "2 values"),
        ([{"name": "x", "shape": [1, 3], "data": ["a", "b", "c"]}], "not a number"),
        ([{"name": "x", "shape": [0, 3], "data": []}], "rows"),
        ([{"name": "x", "data": [1, 2, 3]}], "needs a shape"),
        ([7], "None"),
    ],
)
def test_a_sample_that_does_not_fit_names_the_input(inputs: list[object], says: str) -> None:
    with pytest.raises(SpecError, match=says):
        from_document({"inputs": inputs}, LINEAR)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"version": 2}', b"[" * 100_000])
def test_a_sample_that_is_none_is_a_broken_bundle(data: bytes) -> None:
    with pytest.raises(BundleError, match="the recorded sample"):
        Engine(replace(make_bundle(linear()), sample=data))


def test_the_result_of_a_first_load_is_reused(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = make_bundle()
    first = load_engine(bundle, EngineSpec(), wall_s=60.0)[1]
    first = replace(first, warmed_with="ones")
    monkeypatch.setattr(engine, "inspect_graph", None)  # whoever calls it fails
    monkeypatch.setattr(engine, "probe", None)
    told: list[str] = []
    known = Engine(bundle, known=first, on_stage=told.append)
    assert told == ["session", "ones"]
    assert (known.can_merge, known.signature, known.is_bounded) == (True, first.signature, True)
    assert Engine(bundle, known=replace(first, not_merged_because="it mixes")).can_merge is False


def test_prepare_in_the_fork_server_starts_no_thread() -> None:
    before = len(os.listdir("/proc/self/task"))
    service.prepare()
    assert len(os.listdir("/proc/self/task")) <= before
