"""Modules that take several inputs by name: the same on every layout, and exported with their preprocessing."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

from maas_ray.data.sources.arrays import tensor_field
from maas_ray.data.spec.features import CategoricalColumn, Features, NumericColumn, TensorColumn
from maas_ray.data.stored.dataset import TARGET, Dataset, save_dataset
from maas_ray.errors import ModelError, SpecError
from maas_ray.export.onnx_export import export
from maas_ray.export.parity import check_parity
from maas_ray.models.build import build_model
from maas_ray.models.spec import ModelSpec
from maas_ray.row import InputColumn, Row
from maas_ray.spec import parse_spec
from maas_ray.store.objects import ObstoreStore
from maas_ray.train.ranks.preflight import check_run
from maas_ray.train.spec.parallelism import MeshLayout
from maas_ray.train.spec.train import TrainSpec
from maas_ray.train.verify import verify_layouts

HERE = __name__
INPUTS = {"photo": "photo", "numbers": ["weight", "height"], "codes": "kind:ordinal", "flags": ["kind:one_hot"]}
FEATURES = Features(
    columns=(
        NumericColumn(name="height", shift=1.7, scale=0.1),
        CategoricalColumn(name="city", categories=("Lima", "Rome"), encoding="ordinal", unknown="code"),
        TensorColumn(name="photo", shape=(1, 4, 4)),
        CategoricalColumn(name="flag", datatype="INT64", categories=(1, 2)),
        NumericColumn(name="weight", shift=70.0, scale=9.0),
    ),
    task="classification",
    target="y",
    labels=("no", "yes"),
)

PIPELINE: dict[str, object] = {
    "workers": {"count": 2},
    "batch": {"global_size": 12, "accumulation_steps": 2},
    "parallelism": {"pp": 2},
}


class Several(nn.Module):
    def __init__(
        self,
        input_shapes: dict[str, tuple[int, ...]],
        input_columns: dict[str, tuple[InputColumn, ...]],
        num_outputs: int,
    ) -> None:
        super().__init__()
        assert input_shapes == {"photo": (1, 4, 4), "numbers": (2,), "codes": (1,), "flags": (2,)}
        self.table = nn.Embedding(input_columns["codes"][0].cardinality, 8)
        self.pixels = nn.Conv2d(1, 8, 3)
        self.values = nn.Linear(4, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4))
        self.head = nn.Linear(8, num_outputs)

    def forward(self, numbers: Tensor, *, codes: Tensor, photo: Tensor, flags: Tensor) -> Tensor:
        assert codes.dtype == torch.int64
        x = (
            self.table(codes[:, 0])
            + self.pixels(photo).mean(dim=(2, 3))
            + self.values(torch.cat([numbers, flags], dim=1))
        )
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def _dataset(store: ObstoreStore) -> Dataset:
    generator, tables = np.random.default_rng(0), {}
    for split, count in (("train", 48), ("validation", 0), ("test", 0)):
        field, photos = tensor_field("photo", generator.normal(size=(count, 1, 4, 4)).astype(np.float32))
        columns = {
            "height": pa.array(generator.normal(1.7, 0.1, count).astype(np.float32)),
            "city": pa.array(generator.choice(["Lima", "Rome"], count), pa.string()),
            "photo": photos,
            "flag": pa.array(generator.choice([1, 2], count)),
            "weight": pa.array(generator.normal(70, 9, count).astype(np.float32)),
        }
        fields = [field if name == "photo" else pa.field(name, array.type) for name, array in columns.items()]
        table = pa.table(list(columns.values()), schema=pa.schema(fields))
        tables[split] = table.append_column(TARGET, pa.array(generator.integers(0, 2, count)))
    return save_dataset(store, tables, FEATURES, {}, {})


def _spec(store: ObstoreStore, **changes: object) -> TrainSpec:
    fields = {
        "run": "r",
        "model": {"name": f"{HERE}:Several", "inputs": INPUTS},
        "data": {"uri": "rows.csv", "target": "y", "task": "classification"},
        "batch": {"global_size": 12},
        "steps": 4,
        "storage": {"uri": store.uri},
    }
    return parse_spec(TrainSpec, {**fields, **changes})


def test_a_module_with_several_inputs_is_checked_exported_and_passes_the_gate(file_store: ObstoreStore) -> None:
    dataset, spec = _dataset(file_store), _spec(file_store)
    check_run(spec, dataset, file_store)
    net = build_model(spec.model, FEATURES.row, FEATURES.num_outputs)
    assert (type(net).__name__, "table.weight" in net.state_dict()) == ("Several", True)
    graph, signature = export(net, FEATURES)
    assert [one.name for one in signature.inputs] == ["height", "city", "photo", "flag", "weight"]
    assert check_parity(net, FEATURES, graph, dataset.read("train").columns)["passed"]


def test_each_argument_gets_its_columns_in_the_order_of_the_spec() -> None:
    rows = torch.arange(21.0).expand(3, 21).clone()
    rows[:, 1] = 2
    seen = {}

    class Seen(Several):
        def forward(self, **arguments: Tensor) -> Tensor:
            seen.update(arguments)
            return super().forward(**arguments)

    globals()["Seen"] = Seen
    net = build_model(ModelSpec(name=f"{HERE}:Seen", inputs=INPUTS), FEATURES.row, 2)
    net(rows)
    assert seen["numbers"][0].tolist() == [20, 0]
    assert seen["codes"][0].tolist() == [2]
    assert seen["photo"].shape == (3, 1, 4, 4)
    assert seen["photo"][0].flatten().tolist() == list(range(2, 18))
    assert seen["flags"][0].tolist() == [18, 19]


@pytest.mark.fault
def test_a_module_with_several_inputs_trains_the_same_on_every_layout(file_store: ObstoreStore) -> None:
    dataset = _dataset(file_store)
    layouts = [MeshLayout(dp_replicate=2), MeshLayout(dp_shard=2), MeshLayout(pp=2), MeshLayout(pp=2, schedule="1f1b")]
    spec = _spec(file_store, **PIPELINE | {"parallelism": {"pp": 2, "pp_split": ["blocks.1"]}})
    compared = verify_layouts(spec, dataset.digest, layouts, steps=3)
    assert all(one.is_equal for one in compared), compared


def test_stages_that_would_divide_the_inputs_are_refused(file_store: ObstoreStore) -> None:
    spec = _spec(file_store, **PIPELINE | {"parallelism": {"pp": 2, "pp_split": ["values"]}})
    with pytest.raises(ModelError, match="no stage of this model can start at 'values'"):
        check_run(spec, _dataset(file_store), file_store)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({**INPUTS, "numbers": ["weight"]}, r"1 columns are in no argument .*'height'"),
        ({**INPUTS, "numbers": ["wieght", "height"]}, r"inputs.numbers: the data has no column 'wieght'; .*'weight'"),
        ({**INPUTS, "numbers": ["weight", "height", "city"]}, r"inputs.numbers: 'city' is ordinal"),
        ({**INPUTS, "photos": "photo"}, r"has no argument 'photos'; .*'photo'"),
        ({"photo": "*"}, r"'city' is ordinal"),
        (
            {"codes": "city", "photo": ["?h*", "kind:numeric", "flag"]},
            r"the argument 'numbers' of forward .* has no columns",
        ),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: dict, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build_model(ModelSpec(name=f"{HERE}:Several", inputs=inputs), FEATURES.row, 2)


def test_rows_without_columns_and_other_models_take_no_inputs() -> None:
    with pytest.raises(ModelError, match="a single tensor or tokens"):
        build_model(ModelSpec(name=f"{HERE}:Several", inputs=INPUTS), Row((3, 8, 8)), 2)
    with pytest.raises(SpecError, match="mlp takes the row as its only argument"):
        parse_spec(ModelSpec, {"name": "mlp", "inputs": INPUTS})
    assert "inputs" not in ModelSpec(name="mlp").model_dump()
