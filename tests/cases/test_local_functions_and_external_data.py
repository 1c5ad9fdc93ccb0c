"""A local function named like a contrib operator ran onnxruntime's native one, bypassing the list of served
operators; and a hard link next to a model was read as its external data. Both are refused before anything runs or is
read.
"""

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state

from maas_ray.bundle.graph import external
from maas_ray.bundle.graph.checks import inspect_graph
from maas_ray.bundle.graph.external import read_onnx
from maas_ray.bundle.graph.functions import is_of_runtime
from maas_ray.errors import BundleError
from maas_ray.foreign.files import Unreadable, open_beside, open_folder, read_file
from maas_ray.registry.importing import import_onnx, read_labels
from maas_ray.store.objects import ObstoreStore
from tests.support.onnx_models import LINEAR, make_graph, value

Function = tuple[str, str, list[onnx.NodeProto]]


def model_with(functions: list[Function], calls: tuple[str, str]) -> onnx.ModelProto:
    """y = f(x) for one of the functions, each of which has one input `a` and one output `b`."""
    domains = {"", calls[0], *(domain for domain, _, _ in functions)}
    opsets = [helper.make_opsetid(domain, 18 if not domain else 1) for domain in sorted(domains)]
    model = make_graph(
        [helper.make_node(calls[1], ["x"], ["y"], domain=calls[0])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
    )
    del model.opset_import[:]
    model.opset_import.extend(opsets)
    model.functions.extend(
        helper.make_function(domain, name, ["a"], ["b"], body, opsets) for domain, name, body in functions
    )
    return model


def node(kind: str, domain: str = "") -> list[onnx.NodeProto]:
    return [helper.make_node(kind, ["a"], ["b"], domain=domain)]


def inspect(model: onnx.ModelProto) -> None:
    inspect_graph(model.SerializeToString(), LINEAR)


def test_onnxruntime_runs_its_own_operator_where_a_function_has_its_name() -> None:
    """Why the rest is needed: without this, there would be nothing to refuse."""
    model = model_with([("com.microsoft", "Gelu", node("Identity"))], ("com.microsoft", "Gelu"))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.float32([[-1, 0, 1]])})
    assert not np.array_equal(found, np.float32([[-1, 0, 1]])), "the function says Identity"


def known_domains() -> list[str]:
    schemas = onnxruntime_pybind11_state.get_all_operator_schema()
    checker = onnx.defs.get_all_schemas_with_history()
    return sorted({schema.domain for schema in (*schemas, *checker)})


@pytest.mark.parametrize(
    "domain",
    [
        *known_domains(),
        "ai.onnx", "ai.onnx.training", "ai.onnx.preview.training", "com.microsoft.experimental", "com.microsoft.dml",
        "com.microsoft.nchwc", "com.ms.internal.nhwc", "org.pytorch.aten", "com.intel.ai", "com.xilinx", "com.Microsoft",
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["Gelu", "Conv", "NotAnOperatorYet"])
def test_a_function_in_a_domain_of_the_runtime_is_refused(domain: str, name: str) -> None:
    with pytest.raises(BundleError, match="in a domain of ONNX or onnxruntime"):
        inspect(model_with([(domain, name, node("Identity"))], (domain, name)))


def test_an_unused_function_is_refused_too() -> None:
    model = model_with([("com.microsoft", "Gelu", node("Identity")), ("my", "f", node("Relu"))], ("my", "f"))
    with pytest.raises(BundleError, match="'com.microsoft::Gelu'"):
        inspect(model)


@pytest.mark.parametrize("domain", ["pkg.onnxscript.torch_lib", "pkg.torch.2.9", "my.company", "community", "com.mine"])
def test_a_function_in_a_domain_of_its_own_is_served(domain: str) -> None:
    assert not is_of_runtime(domain)
    inspect(model_with([(domain, "Gelu", node("Relu"))], (domain, "Gelu")))


def test_functions_may_call_each_other() -> None:
    inner = ("my", "inner", node("Relu"))
    inspect(model_with([("my", "outer", node("inner", "my")), inner], ("my", "outer")))


def in_a_branch(name: str) -> list[onnx.NodeProto]:
    branch = helper.make_graph(
        [helper.make_node(name, ["a"], ["c"], domain="my")], "branch", [], [value("c", TensorProto.FLOAT, None)]
    )
    yes = helper.make_node("Constant", [], ["yes"], value=helper.make_tensor("t", TensorProto.BOOL, [], [True]))
    return [yes, helper.make_node("If", ["yes"], ["b"], then_branch=branch, else_branch=branch)]


@pytest.mark.parametrize(
    "functions",
    [
        [("my", "f", node("f", "my"))],
        [("my", "f", node("g", "my")), ("my", "g", node("f", "my"))],
        [("my", "f", node("g", "my")), ("my", "g", node("h", "my")), ("my", "h", node("g", "my"))],
        [("my", "f", in_a_branch("f"))],
        [("my", "f", node("Relu")), ("my", "unused", node("unused", "my"))],
    ],
    ids=["itself", "each other", "two behind one", "in a branch", "an unused one"],
)
def test_a_function_that_calls_itself_is_refused(functions: list[Function]) -> None:
    with pytest.raises(BundleError, match="calls itself"):
        inspect(model_with(functions, ("my", "f")))


def test_a_chain_of_many_functions_needs_no_recursion_of_ours() -> None:
    depth = 3000
    functions = [("my", f"f{i}", node(f"f{i + 1}", "my") if i < depth else node("f0", "my")) for i in range(depth + 1)]
    with pytest.raises(BundleError, match="calls itself"):
        inspect(model_with(functions, ("my", "f0")))


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(BundleError, match="twice"):
        inspect(model_with([("my", "f", node("Relu")), ("my", "f", node("Identity"))], ("my", "f")))


SECRET = np.float32([[1, 2, 3]]).tobytes()


def model_beside(folder: Path, name: str = "weights.bin") -> Path:
    """A model whose weights are in another file, which is not there yet."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1, 3], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value=name)
    model = make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("y", TensorProto.FLOAT, ["n", 3])],
    )
    model.graph.initializer.append(weight)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder / "model.onnx"


def hard_link(secret: Path, place: Path) -> None:
    os.link(secret, place)


def symbolic_link(secret: Path, place: Path) -> None:
    place.symlink_to(secret)


def link_within_the_folder(secret: Path, place: Path) -> None:
    place.with_name("real.bin").write_bytes(SECRET)
    place.symlink_to("real.bin")


def pipe(secret: Path, place: Path) -> None:
    os.mkfifo(place)


def directory(secret: Path, place: Path) -> None:
    place.mkdir()


def device(secret: Path, place: Path) -> None:
    place.symlink_to("/dev/zero")


def huge(secret: Path, place: Path) -> None:
    place.touch()
    os.truncate(place, 1 << 41)


ODD = [hard_link, symbolic_link, link_within_the_folder, pipe, directory, device, huge]


@pytest.mark.parametrize("make", ODD)
def test_only_files_of_its_own_folder_are_data_of_a_model(
    tmp_path: Path, file_store: ObstoreStore, make: Callable[[Path, Path], None]
) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET)
    folder = tmp_path / "downloaded"
    folder.mkdir()
    path = model_beside(folder)
    make(secret, folder / "weights.bin")
    with pytest.raises(BundleError, match="weights.bin"):
        import_onnx(file_store, path)
    assert list(file_store.scan("")) == [], "nothing was committed"


def test_a_plain_file_next_to_the_model_is_its_data(tmp_path: Path) -> None:
    path = model_beside(tmp_path)
    (tmp_path / "weights.bin").write_bytes(SECRET)
    model = onnx.load_model_from_string(read_onnx(path).graph)
    assert model.graph.initializer[0].raw_data == SECRET


def test_the_folder_that_was_opened_is_the_one_that_is_read(tmp_path: Path) -> None:
    """A folder that is exchanged for another one meanwhile changes nothing."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    for each in (folder, other):
        each.mkdir()
        (each / "data").write_bytes(each.name.encode())
    with open_folder(folder) as descriptor:
        folder.rename(tmp_path / "moved")
        other.rename(folder)
        with open_beside(descriptor, "data", 100) as opened:
            assert opened.read(0, opened.size) == b"folder"


@pytest.mark.parametrize("name", ["", ".", "..", "../secret", "/etc/passwd", "inner/file", "a\0b"])
def test_a_name_that_leaves_the_folder_is_not_opened(tmp_path: Path, name: str) -> None:
    with open_folder(tmp_path) as folder, pytest.raises(Unreadable), open_beside(folder, name, 100):
        pass


@pytest.mark.parametrize("make", [pipe, directory, device, huge])
def test_files_that_the_user_names_are_regular_and_bounded(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    place = tmp_path / "labels.txt"
    make(tmp_path, place)
    with pytest.raises(Unreadable):
        read_file(place, 1 << 20)
    with pytest.raises(Exception, match="labels") as caught:
        read_labels(None, place)
    assert type(caught.value).__name__ == "SpecError"


@pytest.mark.parametrize("make", [pipe, directory, device, huge])
def test_a_model_file_is_regular_and_bounded(tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    place = tmp_path / "model.onnx"
    make(tmp_path, place)
    with pytest.raises(BundleError, match="model.onnx"):
        read_onnx(place)


@pytest.mark.fault  # a minute
def test_a_file_that_is_too_large_when_decoded_is_refused_in_a_child(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(external, "BASE_MEMORY_BYTES", 64 << 20)
    body = b"\x0a\x00" * (4 << 20)  # GraphProto.node, empty: two bytes that become more than a hundred in memory
    length, digits = len(body), b""
    while length > 127:
        digits, length = digits + bytes([length & 127 | 128]), length >> 7
    path = tmp_path / "a.onnx"
    path.write_bytes(b"\x3a" + digits + bytes([length]) + body)  # ModelProto.graph
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match="exceed the memory limit|needs more memory than"):
        read_onnx(path)
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    assert grown_kib < 200 << 10, "this process has decoded nothing"
