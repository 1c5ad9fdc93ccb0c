"""Requests of different lengths share a run if the model accepts a mask, with the same outputs as alone."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from maas_ray.bundle.datatypes import Array
from maas_ray.bundle.engine.padding import Padding
from maas_ray.bundle.format import load_bundle
from maas_ray.errors import SpecError
from maas_ray.registry.importing import import_onnx
from maas_ray.registry.padded import read_pad_values
from maas_ray.store.objects import ObstoreStore
from tests.support.onnx_models import make_graph, value
from tests.support.together import ask_together, load

Node = helper.make_node
INT64, FLOAT = TensorProto.INT64, TensorProto.FLOAT


def text_model(*, looks_at_mask: bool = True) -> onnx.ModelProto:
    """Word vectors, and their mean over the words that the mask lets through."""
    counted = "weights" if looks_at_mask else "ones"
    return make_graph(
        [
            Node("Gather", ["table", "ids"], ["words"]),
            Node("Cast", ["mask"], ["weights"], to=FLOAT),
            Node("Mul", ["weights", "zero"], ["zeros"]),
            Node("Add", ["zeros", "one"], ["ones"]),
            Node("Unsqueeze", [counted, "last"], ["column"]),
            Node("Mul", ["words", "column"], ["kept"]),
            Node("ReduceSum", ["kept", "middle"], ["sum"], keepdims=0),
            Node("ReduceSum", [counted, "middle"], ["count"], keepdims=1),
            Node("Max", ["count", "one"], ["at_least_one"]),
            Node("Div", ["sum", "at_least_one"], ["mean"]),
        ],
        [value("ids", INT64, ["batch", "seq"]), value("mask", INT64, ["batch", "seq"])],
        [value("mean", FLOAT, ["batch", 4]), value("words", FLOAT, ["batch", "seq", 4])],
        {
            "table": np.random.default_rng(0).standard_normal((200, 4)).astype(np.float32),
            "zero": np.float32(0),
            "one": np.float32(1),
            "last": np.array([2], np.int64),
            "middle": np.array([1], np.int64),
        },
    )


def write(tmp_path: Path, model: onnx.ModelProto) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def requests(*lengths: int) -> list[dict[str, Array]]:
    random = np.random.default_rng(1)
    return [
        {
            "ids": random.integers(1, 200, (1 + number % 2, length)),
            "mask": np.ones((1 + number % 2, length), np.int64),
        }
        for number, length in enumerate(lengths)
    ]


def test_requests_of_different_lengths_share_a_run_and_get_their_own_answers(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    imported = import_onnx(file_store, write(tmp_path, text_model()), pad="seq=mask", pad_values={"ids": 7})
    assert "not_padded_because" not in imported.info.parity
    padded = imported.info.signature.padded
    assert padded is not None
    assert (padded.inputs, padded.outputs) == ({"ids": 1, "mask": 1}, {"words": 1})
    engine = load(load_bundle(file_store, imported.bundle_id))
    assert engine.padding is not None, engine.not_padded_because
    sent = requests(5, 8, 6, 7, 8, 5, 17, 20, 6, 1)
    answers, counted = ask_together(engine, sent, num_rounds=2, check_share=0.1)
    for request, answer in zip([*sent, *sent], answers, strict=True):
        right = engine.run(request)
        assert answer["words"].shape == right["words"].shape
        np.testing.assert_array_equal(answer["words"], right["words"])
        np.testing.assert_allclose(answer["mean"], right["mean"], rtol=1e-5)
    assert sorted(counted.runs) == [1, 1, 2, 2, 7, 7], "5 to 8, 17 to 20, and 1 word are three powers of two"
    assert counted.checks
    assert not any(counted.checks)


def test_a_model_that_does_not_look_at_its_mask_is_not_padded(file_store: ObstoreStore, tmp_path: Path) -> None:
    imported = import_onnx(file_store, write(tmp_path, text_model(looks_at_mask=False)), pad="seq=mask")
    assert "'mean' differs between a padded row and the row alone" in imported.info.parity["not_padded_because"]
    engine = load(load_bundle(file_store, imported.bundle_id))
    assert engine.padding is None
    answers, counted = ask_together(engine, requests(5, 8, 5, 8))
    assert sorted(counted.runs) == [2, 2], "equal lengths share a run all the same"
    assert all(isinstance(answer, dict) for answer in answers)


def test_an_input_that_disagrees_on_its_length_runs_alone(file_store: ObstoreStore, tmp_path: Path) -> None:
    imported = import_onnx(file_store, write(tmp_path, text_model()), pad="seq=mask")
    engine = load(load_bundle(file_store, imported.bundle_id))
    good = requests(5, 6)
    bad = {"ids": good[0]["ids"], "mask": np.ones((1, 6), np.int64)}
    answers, counted = ask_together(engine, [*good, bad])
    assert [isinstance(answer, dict) for answer in answers] == [True, True, False]
    assert counted.runs == [2]


def test_nothing_is_padded_where_nothing_is_stated(file_store: ObstoreStore, tmp_path: Path) -> None:
    imported = import_onnx(file_store, write(tmp_path, text_model()))
    assert "padded" not in imported.info.model_dump(mode="json")["signature"]
    _, counted = ask_together(load(load_bundle(file_store, imported.bundle_id)), requests(5, 6, 5))
    assert sorted(counted.runs) == [1, 2]


@pytest.mark.parametrize(
    ("pad", "values", "message"),
    [
        ("seq", {}, "not of the form DIMENSION=MASK"),
        ("length=mask", {}, "not an input with the dimension 'length'"),
        ("batch=mask", {}, "not an input with the dimension 'batch'"),
        ("seq=table", {}, "inputs with it: 'ids', 'mask'"),
        ("seq=mask", {"words": 1.0}, "does not have the dimension"),
    ],
)
def test_inputs_that_cannot_be_padded_are_refused(
    file_store: ObstoreStore, tmp_path: Path, pad: str, values: dict[str, float | str], message: str
) -> None:
    with pytest.raises(SpecError, match=message):
        import_onnx(file_store, write(tmp_path, text_model()), pad=pad, pad_values=values)


def test_values_for_padding_are_read_from_a_command() -> None:
    assert read_pad_values(["ids=1", "words=[PAD]"]) == {"ids": 1.0, "words": "[PAD]"}
    with pytest.raises(SpecError, match="NAME=VALUE"):
        read_pad_values(["ids"])


def test_padding_keeps_the_sizes_of_other_inputs_apart(file_store: ObstoreStore, tmp_path: Path) -> None:
    imported = import_onnx(file_store, write(tmp_path, text_model()), pad="seq=mask")
    assert imported.info.signature.padded is not None
    padding = Padding(imported.info.signature.padded)
    narrow, wide = ({"ids": np.ones((1, 5)), "mask": np.ones((1, 5)), "other": np.ones((1, size))} for size in (2, 3))
    assert padding.form(narrow) != padding.form(wide)
