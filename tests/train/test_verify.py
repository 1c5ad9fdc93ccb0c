"""The same training on every layout, in float64, and faults that the comparison must catch."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.features import Features
from maas_ray.data.stored.dataset import TARGET, Dataset, save_dataset
from maas_ray.errors import ModelError
from maas_ray.models.spec import ModelSpec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.verify import Compared, failures, layouts_for, verify_layouts
from tests.support.small_runs import make_run

SOME = [
    MeshLayout(dp_shard=2),
    MeshLayout(tp=2, sequence_parallel=True),
    MeshLayout(pp=2, schedule="interleaved"),
]
THREE_AXES = MeshLayout(pp=2, dp_shard=2, tp=2)


def _verify(store: ObstoreStore, tmp_path: Path, model: str, layouts: list[MeshLayout]) -> list[Compared]:
    spec, dataset = make_run(store, tmp_path, model, ema={"decay": 0.8})  # its averages are compared as well
    return verify_layouts(spec, dataset.digest, layouts, steps=3)


def test_a_decoder_trains_the_same_in_shards_in_tensor_parallel_layers_and_in_stages(
    file_store: ObstoreStore, tmp_path: Path
) -> None:
    compared = _verify(file_store, tmp_path, "decoder", SOME)
    assert [one.layout for one in compared] == ["FSDP 2", "TP 2 +SP", "PP 2 interleaved"]
    assert all(one.is_equal for one in compared), compared


@pytest.mark.parametrize(
    ("model", "schedule"),
    [
        ("Recurrent", "1f1b"),
        pytest.param("Recurrent", "gpipe", marks=pytest.mark.fault),
        pytest.param("Turned", "1f1b", marks=pytest.mark.fault),
        pytest.param("Turned", "interleaved", marks=pytest.mark.fault),
    ],
)
def test_stages_that_end_in_transposed_views_train_the_same(
    file_store: ObstoreStore, tmp_path: Path, model: str, schedule: str
) -> None:
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(pp=2, schedule=schedule)]
    compared = _verify(file_store, tmp_path, f"tests.support.nets:{model}", layouts)
    assert all(one.is_equal for one in compared), compared


def test_a_layout_that_fails_leaves_the_others_their_results(file_store: ObstoreStore, tmp_path: Path) -> None:
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(pp=2), MeshLayout(dp_shard=2)]
    compared = _verify(file_store, tmp_path, "tests.support.nets:FailsInStages", layouts)
    assert [one.layout for one in compared] == ["DDP 2", "PP 2 1f1b", "FSDP 2"]
    assert [one.is_equal for one in compared] == [True, False, True]
    assert compared[1].error == "ValueError: no stages, please"
    assert failures(compared) == [compared[1]]


@pytest.mark.fault
def test_weights_of_rows_and_classes_train_the_same_on_every_layout(file_store: ObstoreStore, tmp_path: Path) -> None:
    data = {"uri": "rows.csv", "task": "classification", "weight": "w"}
    objective = {"class_weights": "balanced", "l2": 1e-3}
    # The sixth and last step has 2 of 62 rows.
    spec, dataset = make_run(file_store, tmp_path, "mlp", data=data, objective=objective, steps=None, epochs=1)
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(pp=2), MeshLayout(tp=2)]
    compared = verify_layouts(spec, dataset.digest, layouts, steps=6)
    assert all(one.is_equal for one in compared), compared


AUGMENTATION = {"flip": 0.5, "crop": 1, "brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "mixup": 0.4}


@pytest.mark.fault
def test_augmented_images_train_the_same_on_every_layout(file_store: ObstoreStore, tmp_path: Path) -> None:
    spec, _ = make_run(
        file_store, tmp_path, "mlp", augmentation=AUGMENTATION, batch={"global_size": 12, "accumulation_steps": 2}
    )
    spec = spec.model_copy(update={"model": ModelSpec(name="convnet", params={"size": 1})})
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_replicate=3), MeshLayout(dp_shard=2), MeshLayout(pp=2)]
    compared = verify_layouts(spec, _images(file_store).digest, layouts, steps=5)  # the sixth step begins an epoch
    assert all(one.is_equal for one in compared), compared


def _images(store: ObstoreStore) -> Dataset:
    rng = np.random.default_rng(0)
    tables = {}
    for split, num_rows in (("train", 50), ("validation", 0), ("test", 0)):
        pixels = rng.integers(0, 256, (num_rows, 3, 8, 8)).astype(np.uint8)
        field, array = tensor_field("image", pixels)
        table = pa.table([array], schema=pa.schema([field]))
        tables[split] = table.append_column(TARGET, pa.array(rng.integers(0, 4, num_rows)))
    column = {"kind": "tensor", "name": "image", "datatype": "UINT8", "shape": [3, 8, 8], "shift": [128], "scale": [64]}
    fields = {"columns": [column], "task": "classification", "target": "t", "labels": ["a", "b", "c", "d"]}
    return save_dataset(store, tables, Features.model_validate(fields), {}, {})


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["mlp", "decoder", "encoder"])
def test_every_family_trains_the_same_on_every_layout(file_store: ObstoreStore, tmp_path: Path, model: str) -> None:
    spec, dataset = make_run(file_store, tmp_path, model, ema={"decay": 0.8})
    layouts = [*layouts_for(spec, dataset, 4), THREE_AXES]
    assert {layout.world for layout in layouts} == {2, 4, 8}
    compared = verify_layouts(spec, dataset.digest, layouts, steps=4)
    assert failures(compared) == []
    # The decoder has two heads of keys and values, which four ranks cannot share.
    assert {one.layout for one in compared if one.refused} <= {"TP 4", "TP 4 +SP"}


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_transformers_models_with_dropout_train_the_same_on_two_ranks(
    file_store: ObstoreStore, tmp_path: Path, model: str
) -> None:
    spec, dataset = make_run(file_store, tmp_path, model)
    layouts = layouts_for(spec, dataset, 2)
    assert {str(layout) for layout in layouts} >= {"DDP 2", "FSDP 2", "PP 2 gpipe", "PP 2 1f1b", "PP 2 interleaved"}
    compared = verify_layouts(spec, dataset.digest, layouts, steps=3)
    assert failures(compared) == []
    refused = [str(one.refused) for one in compared if one.refused]
    # BERT's output layer has the weights of its embedding, and these would be in two stages.
    assert len(refused) == (3 if model == "bert" else 0)
    assert all("are the same weight, but belong to the stages" in reason for reason in refused)


@pytest.mark.fault
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["full", "selective"])
def test_a_decoder_that_keeps_no_activations_trains_the_same_on_every_layout(
    file_store: ObstoreStore, tmp_path: Path, kind: str
) -> None:
    asked = {"performance": {"activation_checkpointing": kind}, "parallelism": {"shard_unit_mib": 0}}
    spec, dataset = make_run(file_store, tmp_path, "decoder", **asked)
    compared = verify_layouts(spec, dataset.digest, [*layouts_for(spec, dataset, 4), THREE_AXES], steps=2)
    assert failures(compared) == []
    assert {one.layout for one in compared if one.refused} <= {"TP 4", "TP 4 +SP"}


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        ("tests.support.nets:ScalesItsGradient", MeshLayout(dp_replicate=2)),
        pytest.param("tests.support.nets:DrawsByRank", MeshLayout(dp_shard=2), marks=pytest.mark.fault),
        pytest.param("tests.support.nets:HidesWhatItNeeds", MeshLayout(pp=2), marks=pytest.mark.fault),
    ],
)
def test_a_model_that_trains_otherwise_on_several_ranks_is_caught(
    file_store: ObstoreStore, tmp_path: Path, fault: str, layout: MeshLayout
) -> None:
    (compared,) = _verify(file_store, tmp_path, fault, [layout])
    assert failures([compared]) == [compared]
    assert compared.gradient_norm > 1e-3


def test_what_cannot_be_arranged_is_refused_with_the_reason(file_store: ObstoreStore, tmp_path: Path) -> None:
    (compared,) = _verify(file_store, tmp_path, "tests.support.nets:Flat", [MeshLayout(tp=2)])
    assert "has no tensor-parallel plan" in str(compared.refused)
    assert failures([compared]) == []


def test_a_model_that_cannot_be_built_is_an_error(file_store: ObstoreStore, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        _verify(file_store, tmp_path, "nowhere.at_all:Net", SOME)
