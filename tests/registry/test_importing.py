"""Import of third-party ONNX files: accepted files, rejected files, and the lineage in responses."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, external_data_helper, helper, numpy_helper

from maas_ray.bundle.engine.engine import Engine
from maas_ray.bundle.format import load_bundle, load_info
from maas_ray.bundle.graph.external import read_onnx
from maas_ray.errors import BundleError, GateError, MaasError, NotFound, SpecError
from maas_ray.registry.importing import import_onnx, read_labels
from maas_ray.registry.models import Registry
from maas_ray.store.objects import ObstoreStore
from tests.support.bundles import save_toy_bundle
from tests.support.onnx_models import linear, lookup, make_graph, mixed, unbatched, value


def write(tmp_path: Path, graph: bytes | onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(graph if isinstance(graph, bytes) else graph.SerializeToString())
    return path


def relu(shape: list[int | str], out: list[int | str] | None = None) -> onnx.ModelProto:
    outputs = [value("y", TensorProto.FLOAT, shape if out is None else out)]
    return make_graph([helper.make_node("Relu", ["x"], ["y"])], [value("x", TensorProto.FLOAT, shape)], outputs)


def without_output_shape() -> onnx.ModelProto:
    model = relu(["n", 3])
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return model


def scalar() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("ReduceSum", ["x"], ["y"], keepdims=0)],
        [value("x", TensorProto.FLOAT, [2, 2])],
        [value("y", TensorProto.FLOAT, [])],
    )


@pytest.mark.parametrize(
    ("graph", "can_merge", "shape"),
    [
        (linear(), True, (-1, 3)),
        (mixed(), True, (-1, 1)),
        (lookup(), True, (-1, 1)),
        (unbatched(), False, (4,)),
        (relu([1, 3]), False, (1, 3)),
        (relu([0, 3]), False, (0, 3)),
        (relu([]), False, ()),
        (relu([2, "w"]), False, (2, -1)),
        (scalar(), False, (2, 2)),
        (without_output_shape(), True, (-1, 3)),
    ],
    ids=["rows", "strings", "table", "vector", "fixed-1", "fixed-0", "scalar", "fixed-2", "to-scalar", "no-shape"],
)
def test_any_sound_graph_is_imported_and_its_bundle_runs(
    file_store: ObstoreStore, tmp_path: Path, graph: bytes | onnx.ModelProto, can_merge: bool, shape: object
) -> None:
    imported = import_onnx(file_store, write(tmp_path, graph))
    assert imported.info.parity["run"] == "passed"
    assert imported.info.parity["can_merge"] is can_merge
    bundle = load_bundle(file_store, imported.bundle_id)
    assert bundle.info == imported.info
    assert bundle.info.signature.inputs[0].shape == shape
    Engine(bundle).close()


def test_an_imported_version_leads_back_to_its_file(file_store: ObstoreStore, tmp_path: Path) -> None:
    path = write(tmp_path, linear())
    registry = Registry(file_store)
    version = registry.publish("m", import_onnx(file_store, path, task="regression").bundle_id)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert version.run == f"import-{digest[:16]}"
    info = registry.info(version)
    assert info.task == "regression"
    assert info.lineage.imported is not None
    assert (info.lineage.imported.file, info.lineage.imported.sha256) == ("model.onnx", digest)
    assert import_onnx(file_store, path, task="regression").bundle_id == version.bundle, (
        "the same file, the same bundle"
    )


def test_fields_of_imported_bundles_do_not_change_the_bundles_of_runs(file_store: ObstoreStore) -> None:
    info = load_info(file_store, save_toy_bundle(file_store))
    assert "imported" not in info.model_dump(mode="json")["lineage"]


# External data


def big(tmp_path: Path) -> onnx.ModelProto:
    """y = x @ w + b, with w and b in one file beside the model; returns the model as it refers to them."""
    weights = {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.float32([1, 2, 3, 4])}
    model = make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 4])],
        weights,
    )
    onnx.save_model(
        model, tmp_path / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    return onnx.load_model(tmp_path / "model.onnx", load_external_data=False)


def test_external_weights_are_embedded(file_store: ObstoreStore, tmp_path: Path) -> None:
    big(tmp_path)
    path = tmp_path / "model.onnx"
    imported = import_onnx(file_store, path)
    (tmp_path / "weights.bin").unlink()
    outputs = Engine(load_bundle(file_store, imported.bundle_id)).run({"x": np.ones((2, 3), np.float32)})
    assert outputs["y"].tolist() == [[13.0, 17.0, 21.0, 25.0]] * 2


def test_the_digest_is_of_the_file_and_its_data(tmp_path: Path) -> None:
    big(tmp_path)
    content = (tmp_path / "model.onnx").read_bytes() + (tmp_path / "weights.bin").read_bytes()
    assert read_onnx(tmp_path / "model.onnx").sha256 == hashlib.sha256(content).hexdigest()


def entry(model: onnx.ModelProto, key: str, text: str) -> None:
    for tensor in model.graph.initializer:
        for found in tensor.external_data:
            if found.key == key:
                found.value = text
                return
    added = model.graph.initializer[0].external_data.add()
    added.key, added.value = key, text


def link(tmp_path: Path, model: onnx.ModelProto) -> None:
    (tmp_path / "weights.bin").rename(tmp_path / "elsewhere.bin")
    (tmp_path / "weights.bin").symlink_to(tmp_path / "elsewhere.bin")


def folder_link(tmp_path: Path, model: onnx.ModelProto) -> None:
    (tmp_path / "inner").symlink_to("/etc")
    entry(model, "location", "inner/passwd")


def pipe(tmp_path: Path, model: onnx.ModelProto) -> None:
    (tmp_path / "weights.bin").unlink()
    os.mkfifo(tmp_path / "weights.bin")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path, model: entry(model, "location", "../weights.bin"), "only plain file names"),
        (lambda path, model: entry(model, "location", "/etc/passwd"), "only plain file names"),
        (lambda path, model: entry(model, "location", "a\\b"), "only plain file names"),
        (lambda path, model: entry(model, "location", "C:weights"), "only plain file names"),
        (lambda path, model: entry(model, "location", ".."), "only plain file names"),
        (lambda path, model: entry(model, "location", ""), "only plain file names"),
        (lambda path, model: entry(model, "location", "w\0.bin"), "only plain file names"),
        (folder_link, "only plain file names"),
        (link, "it is a symbolic link"),
        (pipe, "not a regular file"),
        (lambda path, model: (path / "weights.bin").unlink(), "does not exist"),
        (lambda path, model: (path / "weights.bin").write_bytes(b"short"), "but its file has 5"),
        (lambda path, model: entry(model, "offset", "999999"), "but its file has"),
        (lambda path, model: entry(model, "offset", "-4"), "an invalid offset"),
        (lambda path, model: entry(model, "length", "5"), "5 bytes of external data instead of"),
        (lambda path, model: entry(model, "length", "9" * 30), "an invalid length"),
        (lambda path, model: model.graph.initializer[0].dims.__setitem__(0, 10**15), "instead of"),
        (lambda path, model: model.graph.initializer[0].dims.__setitem__(0, -3), "impossible shape"),
    ],
)  # fmt: skip
def test_external_data_that_is_not_what_it_may_be_is_refused(
    file_store: ObstoreStore, tmp_path: Path, change: Callable[[Path, onnx.ModelProto], object], message: str
) -> None:
    model = big(tmp_path)
    change(tmp_path, model)
    with pytest.raises(BundleError, match=message):
        import_onnx(file_store, write(tmp_path, model))
    assert list(file_store.scan("")) == [], "nothing was committed"


def test_external_data_hidden_in_a_branch_is_found(file_store: ObstoreStore, tmp_path: Path) -> None:
    inner = numpy_helper.from_array(np.float32([1.0]), "c")
    external_data_helper.set_external_data(inner, "../secret")
    inner.ClearField("raw_data")
    branch = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["z"])], "b", [], [value("z", TensorProto.FLOAT, [1])], [inner]
    )
    model = make_graph(
        [helper.make_node("If", ["yes"], ["y"], then_branch=branch, else_branch=branch)],
        [value("yes", TensorProto.BOOL, [])],
        [value("y", TensorProto.FLOAT, [1])],
    )
    with pytest.raises(BundleError, match="only plain file names"):
        import_onnx(file_store, write(tmp_path, model))


# What is refused


def foreign() -> onnx.ModelProto:
    model = onnx.load_model_from_string(linear())
    model.graph.node[0].domain = "com.example"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    return model


def divides_by_zero() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("Div", ["x", "zero"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
        {"zero": np.float32([0.0])},
    )


def draws() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("RandomNormalLike", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
    )


def a_sequence() -> onnx.ModelProto:
    return make_graph(
        [helper.make_node("SequenceConstruct", ["x"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)],
    )


@pytest.mark.parametrize(
    ("graph", "error", "message"),
    [
        (b"PK\x03\x04 not ONNX", BundleError, "not an ONNX model"),
        (b"", BundleError, "shape|not an ONNX|checker|1 to"),
        (foreign(), BundleError, "com.example::Mul; only operators of the domains"),
        (divides_by_zero(), GateError, "not finite.*--no-check"),
        (draws(), GateError, "differs between two runs.*--no-check"),
        (a_sequence(), BundleError, "'y'"),
    ],
    ids=["zip", "empty", "foreign", "infinite", "random", "sequence"],
)
def test_what_cannot_be_served_is_refused_with_its_reason(
    file_store: ObstoreStore, tmp_path: Path, graph: bytes | onnx.ModelProto, error: type[MaasError], message: str
) -> None:
    with pytest.raises(error, match=message):
        import_onnx(file_store, write(tmp_path, graph))
    assert list(file_store.scan("")) == []


def test_a_graph_that_refuses_random_values_is_imported_with_a_note(file_store: ObstoreStore, tmp_path: Path) -> None:
    graph = make_graph(
        [helper.make_node("Add", ["one", "two"], ["y"])],
        [value("one", TensorProto.FLOAT, ["n", "a"]), value("two", TensorProto.FLOAT, ["n", "a"])],
        [value("y", TensorProto.FLOAT, ["n", "a"])],
    )
    graph.graph.node.insert(0, helper.make_node("Reshape", ["one", "pairs"], ["one_of_pairs"]))
    graph.graph.node[1].input[0] = "one_of_pairs"
    graph.graph.initializer.append(numpy_helper.from_array(np.array([-1, 2], np.int64), "pairs"))
    imported = import_onnx(file_store, write(tmp_path, graph))
    assert imported.info.parity["run"] == "random values are refused"


def test_a_run_that_is_meant_to_be_infinite_can_be_left_out(file_store: ObstoreStore, tmp_path: Path) -> None:
    imported = import_onnx(file_store, write(tmp_path, divides_by_zero()), is_checked=False)
    assert imported.info.parity == {
        "status": "imported", "run": "left out", "can_merge": True, "warm_up": "zeros", "process": "the replica's",
    }  # fmt: skip


def test_a_file_that_is_not_there_is_not_found(file_store: ObstoreStore, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no file"):
        import_onnx(file_store, tmp_path / "none.onnx")
    with pytest.raises(BundleError, match="is not a regular file"):
        import_onnx(file_store, tmp_path)


# Labels


def test_labels_come_from_a_list_or_a_file(file_store: ObstoreStore, tmp_path: Path) -> None:
    names = tmp_path / "labels.txt"
    names.write_text("cat\ndog\n\nbird\n")
    assert read_labels(None, names) == read_labels("cat, dog,bird", None) == ("cat", "dog", "bird")
    assert read_labels(None, None) is None
    imported = import_onnx(file_store, write(tmp_path, linear()), task="classification", labels=("cat", "dog", "bird"))
    assert load_info(file_store, imported.bundle_id).labels == ("cat", "dog", "bird")


@pytest.mark.parametrize("labels", [("a", "b"), ("a", "a", "b"), ("a", "", "b"), ()])
def test_labels_that_fit_no_output_are_refused(
    file_store: ObstoreStore, tmp_path: Path, labels: tuple[str, ...]
) -> None:
    with pytest.raises(SpecError, match="labels"):
        import_onnx(file_store, write(tmp_path, linear()), labels=labels)


def test_two_kinds_of_labels_are_one_too_many(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="exclude each other"):
        read_labels("a", tmp_path)
    with pytest.raises(SpecError, match="does not exist"):
        read_labels(None, tmp_path / "none")
